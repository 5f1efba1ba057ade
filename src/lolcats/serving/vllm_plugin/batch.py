"""Prompts of different lengths in rows of equal length, so that a mixer takes many of them in one call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WASTE = 2
"""A row has at most so many times the tokens of the shortest text that is padded to its length."""


class Rows(NamedTuple):
    """Texts, or their next parts, in rows that are padded on the right."""

    numbers: Tensor
    """[B] int64, which of the texts they are."""
    token: Tensor
    """[B, N] int64, places of their tokens among those of all texts; at padding any."""
    padding: Tensor | None
    """[B, N] bool, False at padding; None where there is none."""
    real: Tensor
    """[T] int64, which of the B x N places hold tokens."""

    @property
    def places(self) -> Tensor:
        """[T] int64: where the tokens at `real` are among those of all texts."""
        return self.token.flatten().index_select(0, self.real)


def group_rows(starts: Sequence[int], device: torch.device | str = "cpu") -> list[Rows]:
    """Texts of similar length together.

    Args:
        starts: [texts + 1], the place of the first token of each text, and at last the end of all.
        device: of the indices, which are made on the host.
    """
    lengths = [end - begin for begin, end in itertools.pairwise(starts)]
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] <= WASTE * lengths[number]:
            groups[-1].append(number)
        else:
            groups.append([number])
    return [_rows(group, starts, lengths, device) for group in groups]


def _rows(group: list[int], starts: Sequence[int], lengths: list[int], device: torch.device | str) -> Rows:
    count = torch.tensor([lengths[i] for i in group])
    column = torch.arange(int(count.max()))
    inside = column < count[:, None]
    token = torch.tensor([starts[i] for i in group])[:, None] + column.minimum(count[:, None] - 1)
    real = inside.flatten().nonzero()[:, 0]
    padding = None if bool(inside.all()) else inside.to(device, non_blocking=True)
    numbers, token, real = (x.to(device, non_blocking=True) for x in (torch.tensor(group), token, real))
    return Rows(numbers, token, padding, real)
