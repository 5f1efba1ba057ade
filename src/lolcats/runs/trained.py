"""What a run has trained, read from its folder without the model: for the artefact of a model that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.config import LinearizationConfig
from lolcats.errors import LolcatsError
from lolcats.modeling.attention import added_parameters, measured_buffers
from lolcats.models.sharded import whole_tensor
from lolcats.models.shards import SHARD_BYTES, read_entries
from lolcats.runs.assembled import Trained, assemble
from lolcats.runs.folder import STAGES, RunFolder
from lolcats.training.checkpoint import load_tensors, save_tensors

PARAMETER = "parameter:"


def added_file(folder: RunFolder) -> Path:
    """Where a run keeps what the linearization added, apart from its model."""
    return folder.path / "added.safetensors"


def added_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What the linearization added to a model, with what it measured on text; whole in each of several processes."""
    tensors = {**added_parameters(model), **measured_buffers(model)}
    return {name: whole_tensor(tensor.detach()) for name, tensor in tensors.items()}


def save_added(folder: RunFolder, tensors: Mapping[str, Tensor]) -> None:
    """Keep `added_tensors` as stage 1 left them.

    Raises:
        LolcatsError: the disk is full or the place cannot be written.
    """
    save_tensors(added_file(folder), tensors, {"step": 0})


def assemble_run(
    folder: RunFolder, target: Path, shard_bytes: int = SHARD_BYTES, dtype: torch.dtype | None = None
) -> None:
    """Write the artefact of a run whose stages are done, without its model in memory; see `assemble`.

    Args:
        folder: of the run.
        target: an empty folder.
        shard_bytes: of one file of weights.
        dtype: of the weights; None is that in which the run would have saved them.

    Raises:
        LolcatsError: a stage is not done, or its files are not there; or what `assemble` raises.
    """
    config, results = folder.config(), folder.results()
    if config.quantization != "none":
        raise LolcatsError(
            f"the run {folder.path} trained on weights of {config.quantization}, which are not those of its teacher's "
            "files; finish it where the quantized model fits into memory"
        )
    for stage in STAGES:
        if getattr(config, stage).enabled and folder.stage_state(stage) != "finished" and stage not in results.notes:
            raise LolcatsError(
                f"{folder.path} is a run whose stage {stage} is not done; finish it first", hint="finish_run"
            )
    added = added_file(folder)
    if not added.is_file():
        raise LolcatsError(f"{folder.path} is a run without a model and without {added.name}; finish it first",
                           hint="finish_run")  # fmt: skip
    own = getattr(torch, results.dtype or "")
    full = config.finetune.enabled and config.finetune.method == "full"
    # On CPUs stage 2 widens weights that were chosen to be bfloat16, see `recipe.finetune`.
    widened = config.dtype == "auto" and own == torch.bfloat16 and (results.device or "").startswith("cpu")
    saved_in = torch.float32 if full and not widened else own
    assemble(
        target, config.model, layers_of(folder), trained_by(folder), dtype=dtype or saved_in,
        merged_in=torch.float32 if widened or full else own, shard_bytes=shard_bytes,
    )  # fmt: skip


def layers_of(folder: RunFolder) -> LinearizationConfig:
    """The settings of a run's layers, with the split that was found for them."""
    layers = folder.config().linearization
    return layers.model_copy(update={"split": folder.results().split}) if layers.searches else layers


def trained_by(folder: RunFolder) -> Trained:
    """What stands in the checkpoints of a run; raises LolcatsError where one cannot be read."""
    config, added = folder.config(), load_tensors(added_file(folder))[0]
    if not config.finetune.enabled:
        return Trained(added)
    best = folder.checkpoints("finetune") / "best.safetensors"
    if config.finetune.method == "full":
        weights = {n.removeprefix(PARAMETER): e for n, e in read_entries(best).items() if n.startswith(PARAMETER)}
        added = {**added, **{n: torch.cat([*weights.pop(n).pieces()]) for n in added.keys() & weights.keys()}}
        return Trained(added, weights=weights)
    found = {n.removeprefix(PARAMETER): t for n, t in load_tensors(best)[0].items()}
    lora: dict[str, Tensor] = {n: t for n, t in found.items() if ".lora_" in n}
    return Trained(
        {**added, **{n: t for n, t in found.items() if n in added}}, lora, config.finetune.alpha / config.finetune.rank
    )
