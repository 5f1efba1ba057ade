"""The artefact of a model that does not fit into memory: put together from the teacher's files and what was trained.

The teacher's weights go from its files to those of the artefact a few rows at a time, and LoRA is merged on the way as
peft does it, so that the artefact is, to the last bit, the one that `save_artefact` writes of a model in memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from lolcats.config import LinearizationConfig
from lolcats.errors import LolcatsError
from lolcats.modeling.attention import LinearizedAttention, added_parameters, measured_buffers
from lolcats.modeling.convert import check_supported
from lolcats.modeling.hf import is_added, mark_as_linearized
from lolcats.modeling.install import install
from lolcats.models.config import read_model_config
from lolcats.models.empty import empty_model
from lolcats.models.folder import check_files, check_place, expand_model, gguf_file
from lolcats.models.shards import SHARD_BYTES, Entry, entries_of, held, weight_files, write_shards
from lolcats.models.teacher import load_tokenizer
from lolcats.printable import reason

FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
"""What of a model on the hub is needed."""
LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass
class Trained:
    """What a run has beside its teacher, all of it small but after full fine-tuning."""

    added: Mapping[str, Tensor]
    """What the linearization added, parameters and what it measured, by their names in the student."""
    lora: Mapping[str, Tensor] = field(default_factory=dict)
    """The matrices by the names that peft gives them in the student, without its prefix."""
    scale: float = 1.0
    """Of the product of the matrices: alpha / rank."""
    weights: Mapping[str, Entry] = field(default_factory=dict)
    """Weights that take the place of the teacher's."""


def assemble(
    folder: Path,
    teacher: str | Path,
    layers: LinearizationConfig,
    trained: Trained,
    *,
    dtype: torch.dtype | None = None,
    merged_in: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a linearized model with its configuration and tokenizer; no more of it is in memory than one LoRA product.

    Args:
        folder: which exists and is empty.
        teacher: a folder or a hub name, with its weights in safetensors.
        layers: the settings of the linearized layers; a budget has its split by now.
        trained: what is put on the teacher.
        dtype: of the weights; None is the teacher's. What the linearization added keeps its own.
        merged_in: the format in which LoRA is added to the weights; None is `dtype`.
        shard_bytes: of one file of weights.

    Raises:
        LolcatsError: the teacher has no such files, is stored in another form than its family computes with, or does
            not fit what was trained; the disk has not the room; or numbers are not finite.
    """
    place = teacher_folder(teacher)
    model = empty_student(place, layers)
    entries = _renamed(model, entries_of(weight_files(place)), place)
    wanted = dtype or next(entry.dtype for entry in entries.values() if entry.dtype.is_floating_point)
    entries |= trained.weights
    entries = _merged(cast_entries(model, entries, merged_in or wanted), model, trained)
    entries = cast_entries(model, entries, wanted)
    if missing := {*added_parameters(model), *measured_buffers(model)} - {*trained.added}:
        raise LolcatsError(f"expected all that the linearization added to {teacher}; {min(missing)} is missing")
    entries |= {name: held(tensor) for name, tensor in trained.added.items()}
    _check_shapes(model, entries, str(teacher))
    write_shards(folder, entries, shard_bytes)
    model.config.dtype = wanted
    model.config.save_pretrained(folder)
    if (place / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(place)
    assert model.generation_config is not None
    model.generation_config.save_pretrained(folder)
    load_tokenizer(str(place)).save_pretrained(folder)


def teacher_folder(source: str | Path) -> Path:
    """The folder of a teacher's files, which are fetched where they are on the hub.

    Raises:
        LolcatsError: there is no such teacher, or it is a GGUF file.
    """
    name = expand_model(source)
    if gguf_file(name) is not None:
        raise LolcatsError(
            f"the weights of {name} are packed (GGUF) and cannot be read piece by piece: the run has to write its "
            "model itself; finish it", hint="finish_run",
        )  # fmt: skip
    check_place(name)
    if not Path(name).is_dir():
        try:
            name = snapshot_download(name, allow_patterns=FILES)
        except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
            raise LolcatsError(
                f"no teacher {name!r}: neither a folder nor a name on the hub; {reason(error)}"
            ) from error
    check_files(name)
    return Path(name)


def empty_student(place: Path, layers: LinearizationConfig) -> PreTrainedModel:
    """The linearized model of the teacher at `place`, without memory for its weights.

    Raises:
        LolcatsError: it cannot be linearized so, or is stored in another form than it computes with.
    """
    if layers.searches:
        raise LolcatsError("expected layers that know their split; it is found when the teacher is converted")
    model = empty_model(read_model_config(str(place)), torch.float32)
    check_supported(model)
    if any(type(c).__name__ == "WeightConverter" for c in get_model_conversion_mapping(model)):
        raise LolcatsError(
            f"the files of {type(model).__name__} hold its weights in another form than it computes with (experts one "
            "by one, for instance), so they cannot be put together piece by piece; load the model and save it"
        )
    mark_as_linearized(model, layers)
    with torch.device("meta"):
        install(model, layers)
    return model


def _renamed(model: PreTrainedModel, entries: Mapping[str, Entry], place: Path) -> dict[str, Entry]:
    """A teacher's tensors by their names in the student; what its family does not load is left out."""
    known, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
    layers = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, LinearizedAttention))
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    found: dict[str, Entry] = {}
    for name, entry in entries.items():
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            layer = next((at for at in layers if candidate.startswith(at)), "")
            inside = f"{layer}inner.{candidate[len(layer) :]}" if layer else candidate
            if inside in known:
                found[inside] = entry
                break
        else:
            if not any(p.search(name) for p in ignored) and "rotary_emb.inv_freq" not in name:
                raise LolcatsError(f"{place} has a tensor {name}, which {type(model).__name__} does not; they differ")
    for target, source in _tied(model).items():  # as in `save_pretrained`: once
        if target in found and source in found and _equal(found[target], found[source]):
            del found[target]
    return found


def _tied(model: PreTrainedModel) -> dict[str, str]:
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _equal(one: Entry, other: Entry) -> bool:
    same = (one.shape, one.dtype) == (other.shape, other.dtype)
    return same and all(torch.equal(a, b) for a, b in zip(one.pieces(), other.pieces(), strict=True))


def cast_entries(model: PreTrainedModel, entries: Mapping[str, Entry], dtype: torch.dtype) -> dict[str, Entry]:
    """A model's weights in another format; float32 where its family wants that, and added ones as they are."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype.itemsize < 4 else set()
    kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()

    def of(name: str, entry: Entry) -> Entry:
        if not entry.dtype.is_floating_point or is_added(name):
            return entry
        return entry.to(torch.float32 if kept.intersection(name.split(".")) else dtype)

    return {name: of(name, entry) for name, entry in entries.items()}


def _merged(entries: dict[str, Entry], model: PreTrainedModel, trained: Trained) -> dict[str, Entry]:
    """Weights with LoRA in them, computed as in peft's `merge`."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in trained.lora.items():
        if (parts := LORA.fullmatch(name)) is None:
            raise LolcatsError(f"expected LoRA matrices; got {name}")
        pairs.setdefault(parts[1], {})[parts[2]] = tensor
    for layer, pair in pairs.items():
        name = f"{layer}.weight"
        if name not in entries or pair.keys() != {"A", "B"}:
            raise LolcatsError(f"LoRA adapts {layer}, of which the teacher has no weight: they do not belong together")
        turned = isinstance(model.get_submodule(layer), Conv1D)
        shape = pair["B"].shape[0], pair["A"].shape[1]
        if entries[name].shape != (shape[::-1] if turned else shape):
            raise LolcatsError(f"LoRA adapts {layer} of shape {list(shape)}, the teacher's is {[*entries[name].shape]}")
        entries[name] = entries[name].plus(lambda pair=pair, turned=turned: _product(pair, trained.scale, turned))
    return entries


def _product(pair: Mapping[str, Tensor], scale: float, turned: bool) -> Tensor:
    product = pair["B"].detach().cpu().float() @ pair["A"].detach().cpu().float()
    product *= scale
    return product.T if turned else product


def _check_shapes(model: PreTrainedModel, entries: Mapping[str, Entry], teacher: str) -> None:
    """Refuse what does not make a whole student."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    spare = _tied(model)
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    for name, shape in wanted.items():
        if name not in entries:
            if name not in spare and not any(p.search(name) for p in ignored):
                raise LolcatsError(f"{teacher} has no tensor {name}; its files are incomplete, copy it again")
        elif entries[name].shape != shape:
            raise LolcatsError(f"{name} has the shape {list(entries[name].shape)}; expected {list(shape)}")
    if strange := entries.keys() - wanted.keys():
        raise LolcatsError(f"{min(strange)} has no place in a student of {teacher}; they do not belong together")
