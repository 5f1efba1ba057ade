"""What each step of a stage reads: sequences of the data, some with questions in their place, or long texts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel

from lolcats.config import FinetuneConfig, OptimConfig
from lolcats.data import PackedDataset
from lolcats.training.batches import step_rows
from lolcats.training.passing import check_passing_context, passing_of
from lolcats.training.recall import recall_of
from lolcats.training.stage import TrainingData


class Sequences(NamedTuple):
    """What one process reads in a step."""

    data: PackedDataset
    rows: np.ndarray
    """int64, which of them."""
    chunk: int | None = None
    """As in `Batch`."""


class Reader:
    """What the steps of a stage read.

    Args:
        config: of the stage.
        data: its sequences.
        seed: of their order, and of all that is made up; nothing else is drawn, so a step depends on it and its number.
        process: which of `processes`; each reads its part of a step.

    Raises:
        LolcatsError: the data cannot give what the settings ask for; see `recall_of` and `passing_of`.
    """

    def __init__(
        self, config: OptimConfig, data: TrainingData, seed: int, process: int = 0, processes: int = 1
    ) -> None:
        self.data, self.batch_size, self.seed = data, config.batch_size, seed
        self.own = slice(process, None, processes)
        self.steps = config.steps(int(data.train.ids.shape[1]))
        self.recall = recall_of(config, data, seed)
        self.passing = passing_of(config, data.train, self.steps, seed, processes)

    @property
    def passing_start(self) -> int:
        """The first step that reads long texts; the number of steps where none does."""
        return self.steps if self.passing is None else self.passing.start

    def read(self, step: int, gap: int | None) -> Sequences:
        """What step `step`, from 0, reads in this process; questions are at most `gap` tokens behind their facts."""
        if self.passing is not None and step >= self.passing.start:
            long = self.passing.rows(step, self.batch_size, self.own.start, self.own.step)
            return Sequences(long, np.arange(len(long)), self.passing.length)
        rows = step_rows(len(self.data.train), step, self.batch_size, self.seed)
        if self.recall is None:
            return Sequences(self.data.train, rows[self.own])
        part = self.recall.replace(rows, self.own, step, gap or self.recall.first_gap)
        return Sequences(part, np.arange(len(part)))


def check_reading(
    config: OptimConfig, data: TrainingData, model: PreTrainedModel, seed: int, processes: int = 1
) -> None:
    """See that a stage can read what it asks for, before anything is trained; raises as `Reader` does.

    Raises:
        LolcatsError: also for long texts that are too long for the model.
    """
    if not config.enabled:
        return
    Reader(config, data, seed, 0, processes)
    if isinstance(config, FinetuneConfig):
        check_passing_context(config, model, int(data.train.ids.shape[1]))
