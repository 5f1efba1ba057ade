"""The pass of the teacher over all that a stage will read, before its steps; see `teacher_logits`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from accelerate import Accelerator

from lolcats.config import FinetuneConfig, OptimConfig
from lolcats.data import PackedDataset
from lolcats.files import check_room
from lolcats.printable import show_bytes
from lolcats.training.batches import make_batch, step_rows
from lolcats.training.parallel import from_main_process
from lolcats.training.stage import Stage, TrainingData
from lolcats.training.teacher_logits import LogitsCache, keys_of

if TYPE_CHECKING:
    from lolcats.training.finetune import FinetuneStage

BLOCK = 1024
"""Sequences that are looked at together."""


def compute_ahead(
    stage: Stage,
    config: OptimConfig,
    data: TrainingData,
    steps: range,
    *,
    seed: int,
    accelerator: Accelerator,
    autocast: torch.dtype | None,
    say: Callable[[str], None],
) -> None:
    """Compute what a stage will ask its cache for and what is not there; each process a part.

    Args:
        stage: without a cache nothing is done.
        config: of the stage.
        data: what it reads.
        steps: those that are left and read sequences of the data as they are.
        seed: of their order.
        accelerator: of the processes.
        autocast: as in training.
        say: told what is computed and how much disk it takes, before.

    Raises:
        LolcatsError: the disk has not the room, or cannot be written.
    """
    cache: LogitsCache | None = getattr(stage, "logits", None)
    if cache is None:
        return
    assert isinstance(config, FinetuneConfig)
    sets = (data.train, data.validation)

    def look() -> list[list[int]]:
        cache.scan(mend=True)
        wanted = [_rows_of(data.train, steps, config.batch_size, seed), np.arange(len(data.validation))]
        found = [list(_missing(cache, part, rows, data.keep_apart)) for part, rows in zip(sets, wanted, strict=True)]
        if any(found):
            count, all_of = sum(map(len, found)), sum(map(len, wanted))
            size = sum(
                len(rows) * cache.sequence_bytes(part.ids.shape[1]) for part, rows in zip(sets, found, strict=True)
            )
            say(f"teacher logits: {count:,} of {all_of:,} sequences to compute, {show_bytes(size)} in {cache.folder}")
            check_room(cache.folder, size)
        return found

    missing = from_main_process(accelerator, look)
    if any(missing):
        start = time.perf_counter()
        for part, rows in zip(sets, missing, strict=True):
            _compute(cast("FinetuneStage", stage), cache, part, rows, config, data.keep_apart, accelerator, autocast)
        cache.flush()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            say(f"teacher logits: computed in {time.perf_counter() - start:,.0f} s")
    cache.scan()


def _rows_of(data: PackedDataset, steps: range, batch_size: int, seed: int) -> np.ndarray:
    """The sequences that some steps read, each once."""
    rows = [step_rows(len(data), step, batch_size, seed) for step in steps]
    return np.unique(np.concatenate(rows)) if rows else np.arange(0)


def _missing(cache: LogitsCache, data: PackedDataset, rows: np.ndarray, keep_apart: bool) -> Iterator[int]:
    """Which rows are not in a cache; of equal ones the first."""
    seen: set[bytes] = set()
    for begin in range(0, len(rows), BLOCK):
        some = data[rows[begin : begin + BLOCK]]
        keys = keys_of(some.ids, some.document if keep_apart else None)
        for row, key in zip(rows[begin : begin + BLOCK].tolist(), keys, strict=True):
            if key not in cache and key not in seen:
                seen.add(key)
                yield row


def _compute(
    stage: FinetuneStage,
    cache: LogitsCache,
    data: PackedDataset,
    rows: list[int],
    config: FinetuneConfig,
    keep_apart: bool,
    accelerator: Accelerator,
    autocast: torch.dtype | None,
) -> None:
    """Put rows into a cache. All processes do as many batches: what one has too few is done once more and dropped."""
    processes, size = accelerator.num_processes, config.micro_batch_size or config.batch_size
    own = rows[accelerator.process_index :: processes]
    for begin in range(0, -(-len(rows) // processes), size):
        some = own[begin : begin + size]
        batch = make_batch(data, np.asarray(some or rows[:1]), accelerator.device, keep_apart)
        with torch.no_grad(), torch.autocast(accelerator.device.type, autocast, enabled=autocast is not None):
            found = stage.teacher_top(batch)
        if some:
            part = data[np.asarray(some)]
            cache.add(keys_of(part.ids, part.document if keep_apart else None), found)
