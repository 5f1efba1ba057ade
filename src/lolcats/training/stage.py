"""What a training stage is to the loop, what it learns from, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from lolcats.data import PackedDataset
from lolcats.errors import LolcatsError
from lolcats.placing import is_spread
from lolcats.training.batches import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Stage(Protocol):
    """What differs between attention transfer and fine-tuning."""

    name: str
    """Folder of the checkpoints and `stage` in the metrics."""
    section: str
    """Of the configuration, where its settings stand."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, float32, by name."""
        ...

    def origin(self) -> dict[str, Any]:
        """What the stage begins with, as JSON: settings of the layers, and a digest of the weights."""
        ...

    def windowed(self, window: int | None) -> AbstractContextManager[None]:
        """Inside, batches are counted and learned from with this window in all layers; None: with their own."""
        ...

    def count(self, batch: Batch) -> float:
        """Tokens, or their weights, over which the loss of the batch is a mean: its weight in a step."""
        ...

    def backward(self, batch: Batch, share: float | Tensor) -> dict[str, Tensor]:
        """Add `share` times the gradient of the batch; return metrics, "loss" among them (detached, not yet read)."""
        ...

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Metrics of a batch without gradients; "loss" decides which checkpoint is best.

        Of a batch with answers (stage 2 alone) `right` and `asked`: how many are right, and how many there are.
        """
        ...

    def where(self, metrics: Mapping[str, Tensor]) -> str:
        """Which part of the model made these metrics not finite, for the error message ("" if unknown)."""
        ...


def refuse_spread(model: nn.Module) -> None:
    """Raise LolcatsError for a model whose parts accelerate keeps in several places."""
    if is_spread(model):
        raise LolcatsError(
            "this model was loaded with a device_map, which is for running it; load it on one device to train it, or "
            "start several processes"
        )


@dataclass
class TrainingData:
    """Sequences to learn from and to validate on."""

    train: PackedDataset
    validation: PackedDataset
    keep_apart: bool = False
    """Whether attention stops at document boundaries."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """Of the data; only for `recall`, which writes text."""


@dataclass
class TrainResult:
    """Outcome of one stage."""

    steps: int
    tokens: int
    seconds: float
    """Time spent on training steps, validation and checkpoints left out."""
    tokens_per_second: float
    best_step: int
    best_loss: float
    final: dict[str, float] = field(default_factory=dict)
    """Validation metrics at the best step."""
    changes: list[str] = field(default_factory=list)
    """Settings that were changed on the way, each with the step after which."""
