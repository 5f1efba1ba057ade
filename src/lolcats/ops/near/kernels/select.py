"""Triton kernels of `select_pairs`. In short texts, as those of training, each candidate is compared with each other
(`_count`); in long ones one program follows the kept pairs of one key head through its text (`_select`).

The kept pairs lie in the order of their rank, best first, in PP slots, a power of two; the slots that are too many are
the best of all and never go. So a pair's slot is the number of others that beat it, and what is counted in a step, C
queries, is how many arrivals do. The order is in memory from step to step. Row b of it is the one in which block b
begins, so the steps of a block all write to the next.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats.ops.hybrid.kernels.launch import on

ARRIVALS = 32
"""Queries of a step, at most."""
COUNTED = 32_768
"""Numbers that a step counts in registers: one for each pair and arrival."""
LARGEST_PAIRS = 4096
SHORT = 8192
"""Candidates up to which each is compared with each other: quadratic, but all at once."""
TILE = 64
"""Candidates of a program of `_count`, and of those that it compares them with at a time."""


@triton.jit(do_not_specialize=["n", "pairs"])
def _count(scores, until, n, pairs, T: tl.constexpr):
    """Grid (tiles of candidates, B KV): `until` [.., P + N] int32 of scores [.., P + N], in the order of arrival.

    A candidate is dropped by the P-th that beats it, be that one of before or of after its own arrival; those that were
    held at the start come at no query.
    """
    head = tl.program_id(1).to(tl.int64)
    total = pairs + n
    scores += head * total
    until += head * total
    own = tl.program_id(0) * T + tl.arange(0, T)
    mine = tl.load(scores + own, mask=own < total, other=float("inf"))
    count = tl.zeros((T,), tl.int32)
    end = tl.zeros((T,), tl.int32) + n
    for first in range(0, total, T):
        other = first + tl.arange(0, T)
        theirs = tl.load(scores + other, mask=other < total, other=-float("inf"))
        ahead = (theirs[None, :] == mine[:, None]) & (other[None, :] < own[:, None])
        beats = ((theirs[None, :] > mine[:, None]) | ahead) & (other < total)[None, :]
        beaten = tl.cumsum(beats.to(tl.int32), 1) + count[:, None]
        stays = tl.sum((beaten < pairs).to(tl.int32), 1)
        goes = (count < pairs) & (stays < T)
        end = tl.where(goes, tl.maximum(first + stays - pairs, 0), end)
        count += tl.sum(beats.to(tl.int32), 1)
    tl.store(until + own, end, mask=own < total)


@triton.jit(do_not_specialize=["n", "pairs", "steps"])
def _select(scores, order, until, n, pairs, steps, PP: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr):
    """Grid (B KV); scores [.., P + N]; order [.., blocks + 1, PP] int32; until [.., P + N] int32; STEPS of a block."""
    head = tl.program_id(0).to(tl.int64)
    scores += head * (pairs + n)
    until += head * (pairs + n)
    order += head * ((steps + STEPS - 1) // STEPS + 1) * PP
    slot = tl.arange(0, PP)
    time = tl.arange(0, C)
    spare = PP - pairs
    for step in range(steps):
        following = order + (step // STEPS + 1) * PP
        kept = tl.load(order + (step + STEPS - 1) // STEPS * PP + slot)
        tl.debug_barrier()  # all is read before anything is written, perhaps to the same row
        kept_score = tl.load(scores + kept, mask=slot >= spare, other=float("inf"))
        begin = step * C
        new = begin + time
        new_score = tl.load(scores + pairs + new, mask=new < n, other=-float("inf"))
        # [pair, arrival]: how often each kept pair is beaten after each arrival, those before it in rank included.
        lost = tl.cumsum((new_score[None, :] > kept_score[:, None]).to(tl.int32), 1)
        stays = (slot[:, None] + lost < PP).to(tl.int32)
        held_for = tl.sum(stays, 1)
        real = slot >= spare
        tl.store(until + kept, tl.where(held_for == C, n, begin + held_for), mask=real)
        rank = slot + tl.sum((new_score[None, :] > kept_score[:, None]).to(tl.int32), 1)
        tl.store(following + rank, kept, mask=rank < PP)
        # [arrival, time]: the same for the arrivals; a kept pair of the same score was there first.
        ahead = tl.sum((kept_score[:, None] >= new_score[None, :]).to(tl.int32), 0)
        earlier = time[None, :] < time[:, None]
        beats = (new_score[None, :] > new_score[:, None]) | ((new_score[None, :] == new_score[:, None]) & earlier)
        beaten = ahead[:, None] + tl.cumsum(beats.to(tl.int32), 1)
        held_for = tl.sum((beaten < PP).to(tl.int32), 1)
        tl.store(until + pairs + new, tl.where(held_for == C, n, begin + held_for), mask=new < n)
        rank = ahead + tl.sum(beats.to(tl.int32), 1)
        tl.store(following + rank, (pairs + new).to(tl.int32), mask=(rank < PP) & (new < n))
        tl.debug_barrier()


def arrivals(padded: int) -> int:
    """Queries of a step, for so many slots."""
    return min(ARRIVALS, COUNTED // padded)


def can_select(scores: Tensor, pairs: int) -> bool:
    """Whether the kernel takes these scores."""
    on_device = scores.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return on_device and scores.dtype == torch.float32 and pairs <= LARGEST_PAIRS


def select(scores: Tensor, pairs: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """`before`, `until` and `after` of `Selection` for scores [B, KV, P + N]; `block` is a multiple of `ARRIVALS`."""
    return (_select_short if scores.shape[-1] <= SHORT else _select_long)(scores, pairs, block)


def _select_short(scores: Tensor, pairs: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, kv_heads, count = scores.shape
    n, scores = count - pairs, scores.contiguous()
    until = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    with torch.cuda.device(scores.device) if scores.is_cuda else torch.no_grad():
        on(_count, (triton.cdiv(count, TILE), batch * kv_heads))(scores, until, n, pairs, T=TILE, num_warps=4)
    until = until.long()
    candidate = torch.arange(count, device=scores.device)
    # When each block begins, and at the end.
    begin = torch.arange(0, n + block, block, device=scores.device).clamp_max(n)[:, None]
    kept = (candidate - pairs < begin) & (until[:, :, None] >= begin)  # [B, KV, blocks + 1, P + N]
    # The latest first: pairs are filled before empty slots, which were there at the start.
    place = torch.where(kept, pairs - kept.cumsum(-1), pairs).clamp(0, pairs)  # whatever scores that are NaN do
    order = torch.empty(*kept.shape[:-1], pairs + 1, dtype=torch.int64, device=scores.device)
    order = order.scatter_(-1, place, candidate.expand_as(place))[..., :pairs]
    return order[:, :, :-1], until, order[:, :, -1]


def _select_long(scores: Tensor, pairs: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, kv_heads, count = scores.shape
    n, padded = count - pairs, max(16, triton.next_power_of_2(pairs))
    queries = arrivals(padded)
    blocks, steps = triton.cdiv(n, block), triton.cdiv(n, queries)
    scores = scores.contiguous()
    order = torch.zeros(batch, kv_heads, blocks + 1, padded, dtype=torch.int32, device=scores.device)
    until = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    first = scores[..., :pairs].sort(dim=-1, descending=True, stable=True).indices
    order[:, :, 0, padded - pairs :] = first
    with torch.cuda.device(scores.device) if scores.is_cuda else torch.no_grad():
        on(_select, (batch * kv_heads,))(
            scores, order, until, n, pairs, steps, PP=padded, C=queries, STEPS=block // queries, num_warps=8
        )  # fmt: skip
    order = order[..., padded - pairs :].long()
    return order[:, :, :-1], until.long(), order[:, :, -1]
