"""Bytes on the disk: what a run leaves, and the hidden states of block-wise transfer meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lolcats.config import RunConfig
from lolcats.modeling.attention import added_parameters, measured_buffers
from lolcats.models.device import choose_device, choose_dtype
from lolcats.planning.shapes import linearized
from lolcats.runs.blocks.plan import stored_bytes
from lolcats.training.blocks.store import disk_bytes as disk_bytes_of_states
from lolcats.training.lora import lora_targets

ADAMW = 3
"""A checkpoint to go on from holds parameters and two moments; the best one parameters alone. All are float32."""


@dataclass(frozen=True)
class RunBytes:
    """What a run leaves."""

    model: int
    """Of the artefact."""
    checkpoints: int
    """Of both stages, the best and the last ones, and what the linearization added as stage 1 left it."""
    control: int
    """Of the trained window: its checkpoints, and its adapters beside the model."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.model + self.checkpoints + self.control


def disk_bytes(teacher: PreTrainedModel, config: RunConfig, width: int | None = None) -> RunBytes:
    """Bytes of the model, its trained control and the checkpoints that a run leaves, from the shapes of its teacher.

    Args:
        teacher: an empty model.
        width: bytes of a frozen weight; None is what the run would have on this machine.

    Raises:
        LolcatsError: the model cannot be linearized with these settings.
    """
    return run_bytes(linearized(teacher, config), config, width)


def run_bytes(model: PreTrainedModel, config: RunConfig, width: int | None = None) -> RunBytes:
    """The same from the linearized model."""
    fine = config.finetune
    added = sum(p.numel() for p in added_parameters(model).values())
    measured = sum(b.numel() * b.itemsize for b in measured_buffers(model).values())
    weights = sum(p.numel() for p in model.parameters()) - added
    trained, tuned = added if config.transfer.enabled else 0, 0
    width = choose_dtype(config.dtype, choose_device(config.device)).itemsize if width is None else width
    if fine.enabled and fine.method == "lora":
        shapes = [model.get_submodule(name).weight.shape for name in lora_targets(model, fine.targets)]
        tuned = sum(fine.rank * sum(shape) for shape in shapes)  # type: ignore[arg-type]
    elif fine.enabled:
        tuned = weights
        width = 4  # full fine-tuning leaves float32 weights
    if fine.enabled and fine.train_feature_maps:
        trained += added
    control = 4 * (ADAMW + 2) * tuned if config.trains_window else 0  # it is kept beside the model too
    left = 4 * added + measured
    return RunBytes(weights * width + left, 4 * (ADAMW + 1) * (trained + tuned) + left, control)


def hidden_bytes(config: RunConfig, tokens: int, hidden: int) -> int:
    """Of the hidden states [tokens, hidden] at one boundary between blocks of layers."""
    dtype = _dtype(config) if config.transfer.blocks.dtype is None else getattr(torch, config.transfer.blocks.dtype)
    return disk_bytes_of_states(tokens, hidden, dtype, 1)


def stored_states(config: RunConfig, hidden: int, blocks: int, at_once: int) -> int:
    """Bytes of disk that `lolcats block` will ask for."""
    return stored_bytes(config, blocks, hidden, _dtype(config), config.data.validation_sequences, at_once)


def _dtype(config: RunConfig) -> torch.dtype:
    """Of the weights on a GPU."""
    return getattr(torch, config.dtype.replace("auto", "bfloat16"))
