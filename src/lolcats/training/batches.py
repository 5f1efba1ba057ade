"""From packed sequences to batches on the device, in an order that depends only on the seed and the step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lolcats.data import PackedDataset, epoch_order


@dataclass
class Batch:
    """One batch; `document` and `position_ids` only where texts are kept apart."""

    input_ids: Tensor  # [B, N] int64
    loss_mask: Tensor  # [B, N] bool
    document: Tensor | None  # [B, N] int64, negative at padding
    position_ids: Tensor | None  # [B, N] int64, starting again at each document
    chunk: int | None = None
    """Tokens after which a long text is cut: its parts are read one by one, the state carried on detached."""
    answers: Tensor | None = None
    """[B, N] int64, equal numbers above 0 at the tokens of one answer; only where answers are measured."""
    place: str = ""
    """Which batch of the stage it is, where it is one: "train-000017", "validation-000"."""

    @property
    def tokens(self) -> int:
        """Tokens in the batch, padding included."""
        return self.input_ids.numel()


def make_batch(
    data: PackedDataset, rows: np.ndarray, device: torch.device | str, keep_apart: bool, chunk: int | None = None
) -> Batch:
    """The sequences `rows` of `data`; `keep_apart` stops attention at document boundaries; `chunk` as in `Batch`."""

    def tensor(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x[rows])).to(device, non_blocking=True)

    document = position = None
    if keep_apart:
        document = tensor(data.document).long()
        index = torch.arange(document.shape[1], device=document.device).expand_as(document)
        starts = torch.ones_like(document, dtype=torch.bool)
        starts[:, 1:] = document[:, 1:] != document[:, :-1]
        position = index - torch.where(starts, index, 0).cummax(-1).values
    return Batch(tensor(data.ids).long(), tensor(data.loss_mask), document, position, chunk)


def cut(
    data: PackedDataset,
    rows: np.ndarray,
    size: int,
    device: torch.device | str,
    keep_apart: bool,
    chunk: int | None = None,
    step: int | None = None,
) -> list[Batch]:
    """The sequences `rows` in batches of `size`; `step`, where they are those of one, is counted in their places."""
    parts = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
    batches = [make_batch(data, part, device, keep_apart, chunk) for part in parts]
    for number, batch in enumerate(batches):
        batch.place = f"validation-{number:03d}" if step is None else f"train-{step * len(parts) + number:06d}"
    return batches


_order = lru_cache(maxsize=2)(epoch_order)  # of millions of sequences it takes longer than a small model's step


def step_rows(size: int, step: int, batch_size: int, seed: int) -> np.ndarray:
    """Rows of optimiser step `step` (from 0): the epochs' permutations one after the other, cut in batches."""
    rows: list[int] = []
    first = step * batch_size
    while len(rows) < batch_size:
        epoch, offset = divmod(first + len(rows), size)
        rows.extend(_order(size, epoch, seed)[offset : offset + batch_size - len(rows)].tolist())
    return np.asarray(rows)
