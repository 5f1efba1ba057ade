"""Triton kernel of `select_pairs`: one program follows the kept pairs of one key head through its text.

The kept pairs lie in the order of their rank, best first, in PP slots, a power of two; the slots that are too many are
the best of all and never go. So a pair's slot is the number of others that beat it, and what is counted in a step, C
queries, is how many arrivals do. The order is in memory from step to step. Row b of it is the one in which block b
begins, so the steps of a block all write to the next.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ARRIVALS = 32
"""Queries of a step, at most."""
COUNTED = 32_768
"""Numbers that a step counts in registers: one for each pair and arrival."""
LARGEST_PAIRS = 4096


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
    batch, kv_heads, count = scores.shape
    n, padded = count - pairs, max(16, triton.next_power_of_2(pairs))
    queries = arrivals(padded)
    blocks, steps = triton.cdiv(n, block), triton.cdiv(n, queries)
    scores = scores.contiguous()
    order = torch.zeros(batch, kv_heads, blocks + 1, padded, dtype=torch.int32, device=scores.device)
    until = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    first = scores[..., :pairs].sort(dim=-1, descending=True, stable=True).indices
    order[:, :, 0, padded - pairs :] = first
    grid: Any = (batch * kv_heads,)
    with torch.cuda.device(scores.device) if scores.is_cuda else torch.no_grad():
        _select[grid](
            scores, order, until, n, pairs, steps, PP=padded, C=queries, STEPS=block // queries, num_warps=8
        )  # fmt: skip
    order = order[..., padded - pairs :].long()
    return order[:, :, :-1], until.long(), order[:, :, -1]
