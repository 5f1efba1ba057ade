"""All batches that stage 1 reads, by place: what lets a block find the hidden states of each, whoever made them."""

from __future__ import annotations

import numpy as np
import torch

from lolcats.config import TransferConfig
from lolcats.training.batches import Batch, cut
from lolcats.training.reading import Reader
from lolcats.training.stage import TrainingData


class Order:
    """The batches of `train` with a `TransferStage` in one process.

    Args:
        config: of the stage.
        data: its sequences.
        seed: of their order.
        device: where batches are made.
    """

    def __init__(self, config: TransferConfig, data: TrainingData, seed: int, device: torch.device | str) -> None:
        self.data, self.device = data, device
        self.reader = Reader(config, data, seed)
        self.size = config.micro_batch_size or config.batch_size
        self.parts = config.batch_size // self.size
        self.training = [f"train-{number:06d}" for number in range(self.reader.steps * self.parts)]
        self.validation = [f"validation-{number:03d}" for number in range(-(-len(data.validation) // self.size))]

    @property
    def places(self) -> list[str]:
        """All of them; those of the validation come first, as few as they are."""
        return [*self.validation, *self.training]

    def rows(self, place: str) -> int:
        """Sequences of a batch."""
        kind, number = place.split("-")
        return self.size if kind == "train" else min(self.size, len(self.data.validation) - int(number) * self.size)

    def batch(self, place: str) -> Batch:
        """The batch of a place."""
        kind, number = place.split("-")
        if kind == "train":
            step, part = divmod(int(number), self.parts)
            recall = self.reader.recall  # stage 1 keeps the gap that it begins with
            data, rows, chunk = self.reader.read(step, None if recall is None else recall.first_gap)
            return cut(data, rows, self.size, self.device, self.data.keep_apart and chunk is None, chunk, step)[part]
        rows = np.arange(len(self.data.validation))
        return cut(self.data.validation, rows, self.size, self.device, self.data.keep_apart)[int(number)]
