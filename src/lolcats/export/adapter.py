"""The adapter: LoRA matrices and what the linearization added, in a folder that peft loads.

peft puts every tensor of an adapter's file whose name the model knows into the model, its own layers or not. So feature
maps, window factors and query scales lie beside the LoRA matrices in `adapter_model.safetensors`, and one
`PeftModel.from_pretrained(converted_model, folder)` restores both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from lolcats.config import load_config
from lolcats.errors import LolcatsError
from lolcats.export.source import Source
from lolcats.modeling import convert
from lolcats.modeling.attention import added_parameters, measured_buffers
from lolcats.modeling.old_names import new_name
from lolcats.models.empty import empty_model
from lolcats.models.shards import check_finite, held
from lolcats.models.teacher import load_teacher
from lolcats.runs.artefact import RECIPE_FILE
from lolcats.runs.assembled import empty_student, teacher_folder
from lolcats.runs.trained import layers_of, trained_by
from lolcats.training.checkpoint import load_tensors
from lolcats.training.lora import lora_config

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""What peft puts before the names of the base model's parameters."""
NO_TARGETS = "dummy-target-modules"
"""peft's word for an adapter without layers of its own: a run without stage 2 has feature maps only."""


def write_adapter(source: Source, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Raises:
        LolcatsError: the run trained all weights, or what it trained is not there any more.
    """
    finetune = source.config.finetune
    lora = trained_lora(source) if finetune.enabled else {}
    model, added = read_added(source)
    tensors = {**lora, **added}
    targets = sorted({n.partition(".lora_A.")[0] for n in lora if ".lora_A." in n})
    if missing := set(targets) - {n for n, _ in model.named_modules()}:
        raise LolcatsError(f"the run's checkpoint adapts {min(missing)}, which the model does not have: they differ")
    config = lora_config(model, finetune, targets)
    config.target_modules = targets or NO_TARGETS
    config.inference_mode = True
    config.base_model_name_or_path = source.config.model
    for name, tensor in lora.items():
        check_finite(name, held(tensor), source.model)
    ready = {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(ready, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def trained_lora(source: Source) -> dict[str, Tensor]:
    """The LoRA matrices of a run, by the names that peft saves them under, without its prefix."""
    if source.config.finetune.method != "lora":
        raise LolcatsError(
            "the run trained all weights (finetune.method=full), so there is no adapter apart from the model; "
            "use the format merged"
        )
    if source.run is None:
        raise LolcatsError(
            f"{source.model} holds merged weights only; the adapter is made from the checkpoints of its run: "
            "give the folder of the run"
        )
    best, kept = source.run.checkpoints("finetune") / "best.safetensors", source.run.adapter / WEIGHTS_FILE
    if best.is_file():
        tensors = {n.removeprefix("parameter:"): t for n, t in load_tensors(best)[0].items()}
    elif kept.is_file():
        tensors = {n.removeprefix(PREFIX): t for n, t in _read_file(kept).items()}
    else:
        raise LolcatsError(f"no {best}, which holds the adapter; use the format merged, or run the recipe again")
    return {n.replace(".default.", "."): t for n, t in tensors.items() if ".lora_" in n}


def read_added(source: Source) -> tuple[PreTrainedModel, Mapping[str, Tensor]]:
    """The model without memory for its weights, and what the linearization added to it."""
    if not source.has_model:
        assert source.run is not None
        model = empty_student(teacher_folder(source.config.model), layers_of(source.run))
        return model, trained_by(source.run).added
    model = empty_model(AutoConfig.from_pretrained(source.model), torch.float32)
    return model, read_tensors(source.model, [*added_parameters(model), *measured_buffers(model)])


def read_tensors(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """Some tensors of a saved model, the others unread.

    Raises:
        LolcatsError: a file cannot be read or a tensor is missing.
    """
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= _read_file(file, set(names))
    if missing := [name for name in names if name not in found]:
        raise LolcatsError(f"{folder} has no tensor {missing[0]}; was it written by lolcats linearize?")
    return found


def _read_file(file: Path, wanted: set[str] | None = None) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            names = {new_name(n): n for n in tensors.keys()}  # noqa: SIM118  # not a dict
            return {new: tensors.get_tensor(n) for new, n in names.items() if wanted is None or new in wanted}
    except (OSError, SafetensorError) as error:
        raise LolcatsError(f"cannot read {file}: {error}") from error


def load_adapter(
    source: str | Path,
    base: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the base model, convert it as the adapter's recipe says, and put the adapter on it.

    Args:
        source: a folder that `lolcats export` wrote in the format adapter, or the hub name of one.
        base: the base model, as for `load_teacher`; None is the one that the adapter names.
        dtype, device: of the base model, as for `load_teacher`.

    Returns:
        The model, with LoRA apart (`merge_and_unload()` merges it), and the base model's tokenizer.

    Raises:
        LolcatsError: no such adapter or base model, or they do not fit each other.
    """
    folder = _local_folder(str(source))
    if not (folder / CONFIG_FILE).is_file() or not (folder / RECIPE_FILE).is_file():
        raise LolcatsError(f"{source} is no exported adapter: expected {CONFIG_FILE} and {RECIPE_FILE} in it")
    layer = load_config(folder / RECIPE_FILE).linearization
    name = base or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not name:
        raise LolcatsError(f"{source} does not say what its base model is; give base=...")
    model, tokenizer = load_teacher(name, dtype=dtype, device=device)
    convert(model, layer.without_text(), seed=0)  # the start is overwritten by what was trained
    model.config.linearization = layer.model_dump(mode="json")  # type: ignore[attr-defined]
    return _put_adapter(model, folder, name), tokenizer


def _put_adapter(model: PreTrainedModel, folder: Path, base: str | Path) -> PeftModel:
    try:
        adapter = PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise LolcatsError(f"the adapter {folder} does not fit the base model {base}: {first}") from error
    known = set(adapter.state_dict())
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        names = map(new_name, file.keys())  # adapters of version 0.1 are loaded too
    strange = [name for name in names if ".lora_" not in name and name not in known]
    if strange:  # peft passes over what it does not know
        raise LolcatsError(f"the adapter {folder} does not fit the base model {base}, which has no {strange[0]}")
    return adapter


def _local_folder(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(source))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LolcatsError(f"no adapter {source!r}: neither a folder nor a name on the hub; {first}") from error
