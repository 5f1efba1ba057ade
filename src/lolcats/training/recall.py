"""Questions about facts among the sequences of a stage, and how far apart the two may be.

A share of the sequences of each step are written anew (`lolcats.data.questions`), with running text of the sequences in
whose places they are. In stage 2 fresh ones, of the validation text, are read at each validation: where 90 % of the
answers are right, the gap doubles (arXiv 2609.16183).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lolcats.config import FinetuneConfig, OptimConfig, TransferConfig
from lolcats.data import PackedDataset
from lolcats.data.questions import Questioned, ask
from lolcats.errors import LolcatsError
from lolcats.modeling.head import OutputHead
from lolcats.training.batches import Batch
from lolcats.training.losses import HEAD_CHUNK
from lolcats.training.resume import Progress
from lolcats.training.stage import TrainingData

MASTERED = 0.9
"""Share of right answers from which on the gap doubles."""
MEASURED = 8
"""Sequences by which that is found out."""
TRAINED, ASKED, STARTED = 17, 18, 19
"""Tell the random numbers of training, of measuring and of the start from each other and from the order of the data."""


class Recall:
    """The sequences with questions of one stage.

    Args:
        share: of the sequences of a step.
        gap: most tokens between fact and question at the start.
        grows: whether the gap doubles.
        data: whose text they are laid into.
        seed: of all that is drawn; what is drawn for a sequence depends on it, the step and the place in the step.

    Raises:
        LolcatsError: `data` has no tokenizer, or a slow one; or its sequences are too short for a question.
    """

    def __init__(self, share: float, gap: int | None, grows: bool, data: TrainingData, seed: int) -> None:
        self.share, self.grows, self.data, self.seed = share, grows, data, seed
        self.length = int(data.train.ids.shape[1])
        self.first_gap = self.length if gap is None else min(gap, self.length)
        if data.tokenizer is None:
            raise LolcatsError("recall writes text: expected its tokenizer in TrainingData(..., tokenizer=...)")
        self.tokenizer = data.tokenizer
        self._write(data.train, 0, [seed, ASKED], self.length)  # whether there is room

    def places(self, step: int, batch_size: int) -> np.ndarray:
        """Which of the sequences of a step, in any process, are written anew: bool [batch_size].

        The share is met over the steps: of 8 sequences 0.15 are one in most steps, two in some.
        """
        before, after = (math.floor(self.share * count * batch_size + 1e-9) for count in (step, step + 1))
        chosen = np.random.default_rng([self.seed, TRAINED, step]).permutation(batch_size)[: after - before]
        return np.isin(np.arange(batch_size), chosen)

    def replace(self, rows: np.ndarray, own: slice, step: int, gap: int) -> PackedDataset:
        """The sequences `rows[own]` of the training data, those of `places` with questions.

        Args:
            rows: int64 [batch_size], the sequences of the step.
            own: which of them this process reads.
            step: from 0.
            gap: most tokens between fact and question.
        """
        part = self.data.train[rows[own]]
        places, numbers = self.places(step, len(rows)), np.arange(len(rows))[own]
        for place in np.flatnonzero(places[own]).tolist():
            number = int(numbers[place])
            found = self._write(self.data.train, int(rows[number]), [self.seed, TRAINED, step, number], gap)
            part.ids[place], part.loss_mask[place], part.document[place] = found.ids, found.answers > 0, 0
        return part

    def questions(self, step: int, gap: int, device: torch.device, size: int) -> list[Batch]:
        """Batches of at most `size` fresh sequences with questions, the same in all processes."""
        starts = np.random.default_rng([self.seed, ASKED, step]).integers(len(self.data.validation), size=MEASURED)
        found = [
            self._write(self.data.validation, int(start), [self.seed, ASKED, step, number], gap)
            for number, start in enumerate(starts)
        ]
        ids, answers = (
            torch.from_numpy(np.stack(arrays)).long().to(device)
            for arrays in ([q.ids for q in found], [q.answers for q in found])
        )
        return [
            Batch(some, marks > 0, None, None, answers=marks)
            for some, marks in zip(ids.split(size), answers.split(size), strict=True)
        ]

    def measure(
        self, progress: Progress, device: torch.device, size: int, validate: Callable[[Batch], dict[str, Tensor]]
    ) -> dict[str, float]:
        """Share of right answers after a step, and the gap at which it was found; nothing where no gap grows."""
        if not self.grows or progress.gap is None:
            return {}
        found = [validate(batch) for batch in self.questions(progress.step, progress.gap, device, size)]
        right, asked = (sum(int(counts[name]) for counts in found) for name in ("right", "asked"))
        return {"recall_accuracy": right / asked, "recall_gap": progress.gap}

    def judge(self, progress: Progress, values: Mapping[str, Any]) -> None:
        """Let facts and questions be farther apart where the answers, as `measure` told, were right."""
        if self.grows and progress.gap is not None:
            progress.accuracy = float(values["recall_accuracy"])
            if progress.accuracy >= MASTERED:
                progress.gap = min(2 * progress.gap, self.length)

    def write_every_second(self, ids: np.ndarray) -> np.ndarray:
        """The first sequences [rows, N] of the training data, each second one with questions, at all distances."""
        ids = ids.copy()
        for row in range(1, len(ids), 2):
            ids[row] = self._write(self.data.train, row, [self.seed, STARTED, row], self.length).ids
        return ids

    def _write(self, data: PackedDataset, row: int, seed: list[int], gap: int) -> Questioned:
        eos = self.tokenizer.eos_token_id
        text = _running_text(data, row, self.length, eos if isinstance(eos, int) else None)
        return ask(np.random.default_rng(seed), self.tokenizer, text, self.length, gap)


def recall_of(config: OptimConfig, data: TrainingData, seed: int) -> Recall | None:
    """The sequences with questions that a stage asks for, None where it asks for none; raises as `Recall` does."""
    if not isinstance(config, TransferConfig | FinetuneConfig) or not config.recall.share:
        return None
    return Recall(config.recall.share, config.recall.gap, isinstance(config, FinetuneConfig), data, seed)


def with_questions(ids: np.ndarray, data: TrainingData, seed: int) -> np.ndarray:
    """See `Recall.write_every_second`; raises as `Recall` does."""
    return Recall(0.5, None, False, data, seed).write_every_second(ids)


def _running_text(data: PackedDataset, row: int, tokens: int, eos: int | None) -> np.ndarray:
    """Tokens from sequence `row` on, without padding and ends of documents; from the beginning again where it ends."""
    found: list[np.ndarray] = []
    for number in range(len(data)):
        at = (row + number) % len(data)
        ids = np.asarray(data.ids[at])
        ids = ids[np.asarray(data.document[at]) >= 0]
        found.append(ids if eos is None else ids[ids != eos])
        if sum(map(len, found)) >= tokens:
            break
    return np.resize(np.concatenate(found), tokens)


@torch.no_grad()
def count_right(head: OutputHead, batch: Batch) -> dict[str, Tensor]:
    """How many answers of a batch are right, and how many there are.

    An answer is right if each of its tokens has the largest logit when the model has read all before it.
    """
    assert batch.answers is not None
    hidden = head.hidden(input_ids=batch.input_ids, use_cache=False)
    answers, wanted = batch.answers[:, 1:], batch.input_ids[:, 1:]
    row, column = (answers > 0).nonzero(as_tuple=True)
    parts = zip(row.split(HEAD_CHUNK), column.split(HEAD_CHUNK), strict=True)
    guesses = torch.cat([head(hidden[rows, columns]).argmax(-1) for rows, columns in parts])
    missed = guesses != wanted[row, column]
    _, which = torch.stack([row, answers[row, column]]).unique(dim=1, return_inverse=True)
    misses = torch.zeros(int(which.max()) + 1, dtype=torch.int64, device=which.device)
    misses.index_add_(0, which, missed.long())
    return {"right": (misses == 0).sum(), "asked": torch.tensor(len(misses), device=which.device)}
