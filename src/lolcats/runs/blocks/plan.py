"""How a model is cut into blocks, where all that belongs to one lies, and how much disk its hidden states take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from lolcats.config import RunConfig, TransferConfig
from lolcats.errors import LolcatsError
from lolcats.models.block import Part
from lolcats.models.empty import model_config
from lolcats.models.folder import check_place, expand, expand_model, gguf_file
from lolcats.models.layers import number_of_layers
from lolcats.models.teacher import explained
from lolcats.runs.folder import RunFolder
from lolcats.training.blocks.store import disk_bytes

METRICS = "metrics.jsonl"
"""In the folder of a block, as in that of a run."""
AS_IT_IS = "as_it_is.safetensors"
"""In the folder of a block that has nothing to learn: the parameters that its layers have nevertheless."""


@dataclass(frozen=True)
class Plan:
    """The blocks of a model: `size` of its `layers` each."""

    layers: int
    size: int

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return self.layers // self.size

    def part(self, number: int) -> Part:
        """The layers of block `number`; the first one reads tokens."""
        return Part(number * self.size, (number + 1) * self.size, embeddings=number == 0)

    def check_number(self, number: int) -> None:
        """Raise LolcatsError where there is no such block."""
        if not 0 <= number < self.count:
            raise LolcatsError(
                f"expected a block from 0 to {self.count - 1} ({self.layers} layers in blocks of {self.size}); got "
                f"{number}"
            )

    def check_ranks(self, ranks: int) -> None:
        """Raise LolcatsError where there are more processes than blocks."""
        if ranks > self.count:
            raise LolcatsError(
                f"{ranks} processes train {self.count} blocks ({self.layers} layers in blocks of {self.size}): start "
                f"at most {self.count}, or set transfer.blocks.size lower"
            )


def plan_of(config: TransferConfig, model: PretrainedConfig) -> Plan:
    """The blocks that settings ask for.

    Raises:
        LolcatsError: none, or of a size that does not divide the layers.
    """
    if config.blocks.size is None:
        raise LolcatsError("transfer.blocks.size is null: all layers are trained together by lolcats linearize; set it "
                           "to the layers of a block")  # fmt: skip
    return cut_layers(number_of_layers(model), config.blocks.size)


def cut_layers(layers: int, size: int) -> Plan:
    """Blocks of `size` layers.

    Raises:
        LolcatsError: the last would be smaller; the message names the sizes that there are.
    """
    if size not in (sizes := block_sizes(layers)):
        raise LolcatsError(f"transfer.blocks.size {size} does not divide the {layers} layers of the model; expected "
                           f"one of {', '.join(map(str, reversed(sizes)))}")  # fmt: skip
    return Plan(layers, size)


def block_sizes(layers: int) -> list[int]:
    """Sizes of blocks that divide so many layers, the largest first."""
    return [size for size in range(layers, 0, -1) if layers % size == 0]


def check_plan(config: RunConfig, ranks: int = 1) -> None:
    """See that blocks can be made as the settings ask, before anything is written or loaded.

    Args:
        config: of the run.
        ranks: processes that train blocks side by side.

    Raises:
        LolcatsError: the first stage is off, the size does not fit, there are too many processes, or no such model.
    """
    if not config.transfer.enabled:
        raise LolcatsError("transfer.enabled is false: there is no first stage that blocks could be trained in")
    source = expand_model(config.model)
    if gguf_file(source) is None:
        check_place(source)
    with explained(source):
        plan_of(config.transfer, model_config(source)).check_ranks(ranks)


class Places:
    """Where the files of a block-wise stage 1 are.

    Args:
        config: of the run.
        folder: of the run.
    """

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        own = config.transfer.blocks.folder
        self.run = folder
        self.root = folder.path / "blocks"
        self.prepared = self.root / "prepared.json"
        self.start = self.root / "start.safetensors"
        self.teacher = self.root / "teacher"
        self.hidden = folder.path / "hidden" if own is None else expand(own) / folder.path.name
        self.checkpoints = folder.checkpoints("transfer")

    def block(self, number: int) -> Path:
        """The checkpoints of a block."""
        return self.checkpoints / f"block-{number:03d}"

    def lock(self, number: int) -> Path:
        """Held by the process that trains a block."""
        return self.block(number) / ".lock"

    def done(self, number: int) -> Path:
        """Written when a block is finished: what the stitch needs to know of its teacher's weights."""
        return self.block(number) / "done.json"

    def boundary(self, number: int) -> Path:
        """The hidden states in front of a block."""
        return self.hidden / f"boundary-{number:03d}"


def hidden_bytes(config: RunConfig, plan: Plan, model: PretrainedConfig, dtype: torch.dtype, validation: int,
                 at_once: int) -> int:  # fmt: skip
    """Bytes of disk that hidden states take at most; see `stored_bytes`.

    Args:
        plan: the blocks of the run.
        model: whose hidden states they are.
        validation: sequences of validation data.
    """
    if config.transfer.blocks.hidden == "recompute":
        return 0
    text: Any = model.get_text_config(decoder=True)
    return stored_bytes(config, plan.count, text.hidden_size, dtype, validation, at_once)


def stored_bytes(config: RunConfig, blocks: int, hidden_size: int, dtype: torch.dtype, validation: int,
                 at_once: int) -> int:  # fmt: skip
    """Bytes of disk that hidden states take at most where they are stored.

    Each is deleted when it has been used, so there are those behind the blocks that are trained, and one more.

    Args:
        config: of the run.
        blocks: how many there are.
        hidden_size: numbers of a token.
        dtype: of the weights.
        validation: sequences of validation data.
        at_once: blocks that are trained at the same time.
    """
    settings, length = config.transfer, config.data.sequence_length
    stored = dtype if settings.blocks.dtype is None else getattr(torch, settings.blocks.dtype)
    boundaries = blocks - 1 if settings.blocks.keep else min(blocks - 1, at_once + 1)
    tokens = settings.steps(length) * settings.batch_size * length
    return disk_bytes(tokens, hidden_size, stored, boundaries, validation * length)
