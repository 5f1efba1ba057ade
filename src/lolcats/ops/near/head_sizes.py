"""Window and kept pairs of key heads that differ in them, as tensors for operations on all of them at once.

Legend: KV key heads; of key head h: window w_h and P_h kept pairs; W and P the most that a key head has. A part is the
key heads of the same sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lolcats.ops.near.selection import EMPTY

SURPLUS = torch.inf
"""Score of a slot that a key head does not have."""


class HeadSizes(NamedTuple):
    """Sizes of the key heads of a layer, on a device."""

    window: Tensor
    """[KV, 1] int64: w_h."""
    surplus: Tensor
    """[KV, 1] int64: P - P_h."""
    marks: Tensor
    """[KV, P] float32: scores of the kept pairs before any token: `SURPLUS`, then `EMPTY`."""
    told: Tensor
    """[KV, 2] int32: w_h and P_h, for the kernel."""
    ring: Tensor
    """[3, S] int64: key head, slot and window of each slot of a ring, part after part."""
    kept: Tensor
    """[3, S] int64: the same of each kept pair."""
    order: Tensor
    """[KV] int64: the key heads, part after part."""
    place: Tensor
    """[KV] int64: where each key head is in that order."""
    most_window: int
    """W."""
    most_pairs: int
    """P, at least 1."""


class Ends(NamedTuple):
    """Where texts are in a call."""

    start: Tensor
    """[B] int64: tokens before these."""
    real: Tensor
    """[B] int64: real tokens among these."""
    is_fresh: bool
    """There are none before these."""


class Slots(NamedTuple):
    """What the slots of all key heads hold: of rings, then of kept pairs, then of sinks, each part after part."""

    k: Tensor
    """[B, S, K]."""
    v: Tensor
    """[B, S, V]."""
    score: Tensor
    """[B, S], without sinks."""
    position: Tensor
    """[B, S] int32, of kept pairs alone."""


@functools.lru_cache(maxsize=4096)
def head_sizes(parts: tuple[tuple[int, int, tuple[int, ...]], ...], device: torch.device) -> HeadSizes:
    """From window, pairs and heads of each part; kept, since what comes from the host is waited for."""
    of_head = {head: (window, pairs) for window, pairs, heads in parts for head in heads}
    windows, pairs = zip(*(of_head[head] for head in range(len(of_head))), strict=True)
    order = [head for *_, heads in parts for head in heads]
    most = max(1, *pairs)

    def slots(count: Sequence[int]) -> Tensor:
        rows = [(h, i, windows[h]) for h in order for i in range(count[h])]
        return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 3).T

    with torch.inference_mode(False):
        told, ordered = (torch.tensor(x, dtype=torch.int64, device=device) for x in ([windows, pairs], order))
        surplus = most - told[1, :, None]
        marks = torch.where(torch.arange(most, device=device) < surplus, SURPLUS, EMPTY)
        return HeadSizes(
            told[0, :, None], surplus, marks, told.T.int().contiguous(), slots(windows).contiguous(),
            slots(pairs).contiguous(), ordered, ordered.argsort(), max(windows), most,
        )  # fmt: skip


def split_slots(x: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """What slots [B, S, ...], contiguous, hold, for each of some (heads, slots): [B, heads, slots, ...]."""
    (rows, _, *rest), (whole, each, *inner) = x.shape, x.stride()
    found, begin = [], 0
    for heads, slots in shapes:  # by one operation, not by a slice of which a view is made
        size = heads * slots * each
        strides = (whole if rows > 1 else size, slots * each, each, *inner)
        found.append(x.as_strided((rows, heads, slots, *rest), strides, begin).contiguous())
        begin += size
    return found
