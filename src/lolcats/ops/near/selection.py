"""Which pairs are kept while a text goes on, without a loop over tokens.

At query i the keys up to i - w have left the window, and of them the P of the highest score are kept. A score is fixed
when its key leaves, so whoever is beaten by P others stays beaten: a pair is kept from when it leaves *until* one
query, and that is all there is to know of it. Blocks of queries carry the kept pairs from one to the next; within a
block every pair is counted against every arrival at once. Of equal scores the earlier one is kept, so what a
call finds in its state must be in the order of positions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

EMPTY = -torch.inf
"""Score of no pair."""


class Selection(NamedTuple):
    """What becomes of M = P + N candidates: the P pairs kept before, then the one that leaves at each query."""

    before: Tensor
    """[B, KV, n, P], integers: candidates that are kept when a block of queries begins; of a fresh text empty ones
    last, and then surplus ones."""
    until: Tensor
    """[B, KV, M], integers: the query from which on the candidate is not kept (N if there is none)."""
    after: Tensor
    """[B, KV, P], integers: candidates that are kept at the end, surplus ones last."""


@torch.no_grad()
def select_pairs(held: Tensor, leaving: Tensor, block: int, surplus: Tensor | None = None) -> Selection:
    """Follow the kept pairs through N queries.

    Args:
        held: [B, KV, P], scores of the pairs that are kept at the start.
        leaving: [B, KV, N], score of the key that leaves with each query; `EMPTY` where none does.
        block: queries of a block.
        surplus: [KV, 1], how many of the first pairs are surplus: of infinite score, so that they are always kept.
    """
    pairs, n = held.shape[-1], leaving.shape[-1]
    scores = torch.cat([held, leaving], -1)
    if scores.is_cuda and not torch.compiler.is_compiling() and (kernel := _kernel(scores, pairs, block)) is not None:
        return by_kernel(kernel, scores, pairs, block, surplus)
    until = torch.full(scores.shape, n, dtype=torch.int64, device=held.device)
    kept = torch.arange(pairs, device=held.device).expand(held.shape)
    before = []
    for begin in range(0, n, block):
        before.append(kept)
        new = torch.arange(begin, min(n, begin + block), device=held.device) + pairs
        pool = torch.cat([kept, new.expand(*kept.shape[:-1], -1)], -1)
        beaten = _beaten(scores.gather(-1, pool), pairs)
        stays = beaten < pairs
        # Beaten once is beaten for good, so the number of queries at which it stays says when it goes.
        left = begin + stays.sum(-1)
        until.scatter_(-1, pool, torch.where(stays[..., -1], n, left))
        rank = beaten[..., -1].long()
        kept = torch.empty_like(pool).scatter_(-1, rank, pool)[..., :pairs]
    return _of_orders(torch.stack([*before, kept], 2), until, surplus)


Kernel = Callable[[Tensor, int, int], tuple[Tensor, Tensor, bool]]
"""`kernels.select.select`."""


def by_kernel(kernel: Kernel, scores: Tensor, pairs: int, block: int, surplus: Tensor | None) -> Selection:
    """`select_pairs` of scores [B, KV, P + N], those of the pairs first."""
    orders, until, best_first = kernel(scores, pairs, block)
    return _of_orders(orders, until, surplus if best_first else None)


def _of_orders(orders: Tensor, until: Tensor, first: Tensor | None) -> Selection:
    """From what is kept when each block begins and at the end, whose `first` [KV, 1] slots belong behind the others."""
    if first is not None:
        pairs = orders.shape[-1]
        place = (torch.arange(pairs, device=orders.device) + first) % pairs
        orders = orders.gather(-1, place[:, None].expand(orders.shape))
    return Selection(orders[:, :, :-1], until, orders[:, :, -1])


def _kernel(scores: Tensor, pairs: int, block: int) -> Kernel | None:
    """The kernel that does the same, where it can."""
    if importlib.util.find_spec("triton") is None:
        return None
    # Not at the top: Triton is a requirement neither of this package nor of the code that `lolcats export` writes.
    from lolcats.ops.near.kernels.select import ARRIVALS, can_select, select

    return select if can_select(scores, pairs) and block % ARRIVALS == 0 else None


def _beaten(scores: Tensor, pairs: int) -> Tensor:
    """By how many each candidate of the pool is beaten after each arrival: [B, KV, P + C, C] int32.

    Args:
        scores: [B, KV, P + C], those of the pairs that are kept, then those of the arrivals.
        pairs: P.
    """
    order = torch.arange(scores.shape[-1], device=scores.device)
    mine, theirs = scores[..., :, None], scores[..., None, :]
    beats = (theirs > mine) | ((theirs == mine) & (order < order[:, None]))
    at_start = beats[..., :pairs].sum(-1, keepdim=True, dtype=torch.int32)
    return at_start + beats[..., pairs:].cumsum(-1, dtype=torch.int32)


class _Take(torch.autograd.Function):
    """x [B, KV, M, d] at index [B, KV, n, P], whose numbers are distinct in each of the n blocks."""

    @staticmethod
    def forward(ctx: object, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)  # type: ignore[attr-defined]
        ctx.shape = x.shape  # type: ignore[attr-defined]
        flat = index.flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
        return x.gather(2, flat).unflatten(2, index.shape[2:])

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors  # type: ignore[attr-defined]
        total = grads[0].new_zeros(ctx.shape)  # type: ignore[attr-defined]
        # Block by block no two gradients meet, so that their sum is the same each time, on GPUs too.
        for block in range(index.shape[2]):
            at = index[:, :, block, :, None].expand(-1, -1, -1, total.shape[-1])
            total.scatter_add_(2, at, grads[0][:, :, block])
        return total, None


def take_pairs(x: Tensor, index: Tensor) -> Tensor:
    """x [B, KV, M, d] at index [B, KV, n, P] -> [B, KV, n, P, d], with gradients that add up in a fixed order."""
    taken = _Take.apply(x, index)
    assert isinstance(taken, Tensor)
    return taken
