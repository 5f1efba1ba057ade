"""Triton kernels of `select_pairs`. In short texts, as those of training, each candidate is compared with each other
(`_count`), and then the pairs of each block are listed (`_list`). Long ones are cut into segments: which pairs are kept
where each begins is found by sorting, because the best of a text so far are among the best of its segments; then a
program follows the kept pairs of one key head through each segment, all side by side (`_select`).

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
import torch.nn.functional as nnf
import triton
import triton.language as tl
from torch import Tensor

from lolcats.ops.devices import device_of
from lolcats.ops.hybrid.kernels.launch import next_power, on, pieces

ARRIVALS = 32
"""Queries of a step, at most."""
COUNTED = 32_768
"""Numbers that a step counts in registers: one for each pair and arrival."""
LARGEST_PAIRS = 4096
SHORT = 8192
"""Candidates up to which each is compared with each other: quadratic, but all at once."""
PROGRAMS, SHORTEST_SEGMENT = 256, 1024
"""How many segments all texts and key heads are cut into at most, and the shortest that is worth one of them."""
TILE, OTHERS = 64, 128
"""Candidates of a program of `_count`, and those that it compares them with at a time."""
LISTED = 512
"""Candidates that `_list` looks at at a time."""


@triton.jit
def _tally(beats, first, pairs, count, found_at, found_count):
    """How many beat each candidate [T] so far, by those [T, OTHERS] from `first` on; where that comes to the P-th."""
    more = count + tl.sum(beats.to(tl.int32), 1)
    goes = (count < pairs) & (more >= pairs)
    return more, tl.where(goes, first, found_at), tl.where(goes, count, found_count)


@triton.jit(do_not_specialize=["n", "pairs"])
def _count(scores, until, n, pairs, T: tl.constexpr, OTHERS: tl.constexpr):
    """Grid (tiles of candidates, B KV): `until` [.., P + N] int32 of scores [.., P + N], in the order of arrival.

    A candidate is dropped by the P-th that beats it, be that one of before or of after its own arrival; those that were
    held at the start come at no query. It is looked for among so many others at once, and then among these.
    """
    head = tl.program_id(1).to(tl.int64)
    total = pairs + n
    scores += head * total
    until += head * total
    own = tl.program_id(0) * T + tl.arange(0, T)
    column = tl.arange(0, OTHERS)
    mine = tl.load(scores + own, mask=own < total, other=float("inf"))
    count, found_count = tl.zeros((T,), tl.int32), tl.zeros((T,), tl.int32)
    found_at = tl.zeros((T,), tl.int32) - 1
    around = tl.program_id(0) * T // OTHERS * OTHERS
    for first in range(0, around, OTHERS):  # of equal scores the earlier one beats
        theirs = tl.load(scores + first + column)
        beats = theirs[None, :] >= mine[:, None]
        count, found_at, found_count = _tally(beats, first, pairs, count, found_at, found_count)
    other = around + column
    theirs = tl.load(scores + other, mask=other < total, other=-float("inf"))
    ahead = (theirs[None, :] == mine[:, None]) & (other[None, :] < own[:, None])
    beats = (theirs[None, :] > mine[:, None]) | ahead
    count, found_at, found_count = _tally(beats, around, pairs, count, found_at, found_count)
    for first in range(around + OTHERS, total, OTHERS):
        theirs = tl.load(scores + first + column, mask=first + column < total, other=-float("inf"))
        beats = theirs[None, :] > mine[:, None]
        count, found_at, found_count = _tally(beats, first, pairs, count, found_at, found_count)
    goes = found_at >= 0
    other = found_at[:, None] + column[None, :]
    theirs = tl.load(scores + other, mask=goes[:, None] & (other < total), other=-float("inf"))
    beats = (theirs > mine[:, None]) | ((theirs == mine[:, None]) & (other < own[:, None]))
    beaten = tl.cumsum(beats.to(tl.int32), 1) + found_count[:, None]
    stays = tl.sum((beaten < pairs).to(tl.int32), 1)
    tl.store(until + own, tl.where(goes, tl.maximum(found_at + stays - pairs, 0), n), mask=own < total)


@triton.jit(do_not_specialize=["n", "pairs", "block"])
def _list(until, orders, n, pairs, block, T: tl.constexpr):
    """Grid (blocks + 1, B KV): what is kept when each block begins and at the end, `orders` [.., blocks + 1, P] int32.

    The latest first: pairs are listed before empty slots, which were there at the start, and surplus ones last.
    """
    head = tl.program_id(1).to(tl.int64)
    begin = tl.minimum(tl.program_id(0) * block, n)
    until += head * (pairs + n)
    orders += (head * tl.num_programs(0) + tl.program_id(0)) * pairs
    last = pairs + begin - 1
    place = pairs * 0
    while (last >= 0) & (place < pairs):
        own = last - tl.arange(0, T)
        kept = tl.load(until + own, mask=own >= 0, other=-1) >= begin
        at = place + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(orders + at, own, mask=kept & (at < pairs))
        place += tl.sum(kept.to(tl.int32), 0)
        last -= T


@triton.jit(do_not_specialize=["n", "pairs", "steps", "segment_steps"])
def _select(
    scores, starts, order, until, n, pairs, steps, segment_steps,
    PP: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Grid (B KV, segments), each of `segment_steps` steps, the steps of whole blocks.

    Scores [.., P + N]; starts [.., segments, PP] int32, the order in which each segment begins; order [.., blocks + 1,
    PP] int32, written from row 1 on; until [.., P + N] int32, of which only what goes is written: it is N at first. No
    two programs write to one place: a pair goes once, and the row in which a segment begins is its predecessor's last.
    """
    head = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    scores += head * (pairs + n)
    until += head * (pairs + n)
    starts += (head * tl.num_programs(1) + segment) * PP
    order += head * ((steps + STEPS - 1) // STEPS + 1) * PP
    slot = tl.arange(0, PP)
    time = tl.arange(0, C)
    spare = PP - pairs
    real = slot >= spare
    first = segment * segment_steps
    for step in range(first, tl.minimum(first + segment_steps, steps)):
        following = order + (step // STEPS + 1) * PP
        now = tl.where(step == first, 1, 0)
        kept = tl.load(starts + slot, mask=(slot < PP * now), other=0)
        kept += tl.load(order + (step + STEPS - 1) // STEPS * PP + slot, mask=(slot >= PP * now), other=0)
        tl.debug_barrier()  # all is read before anything is written, perhaps to the same row
        kept_score = tl.load(scores + kept, mask=real, other=float("inf"))
        begin = step * C
        new = begin + time
        new_score = tl.load(scores + pairs + new, mask=new < n, other=-float("inf"))
        # [pair, arrival]: how often each kept pair is beaten after each arrival, those before it in rank included.
        lost = tl.cumsum((new_score[None, :] > kept_score[:, None]).to(tl.int32), 1)
        stays = (slot[:, None] + lost < PP).to(tl.int32)
        held_for = tl.sum(stays, 1)
        tl.store(until + kept, begin + held_for, mask=real & (held_for < C))
        rank = slot + tl.sum((new_score[None, :] > kept_score[:, None]).to(tl.int32), 1)
        tl.store(following + rank, kept, mask=rank < PP)
        # [arrival, time]: the same for the arrivals; a kept pair of the same score was there first.
        ahead = tl.sum((kept_score[:, None] >= new_score[None, :]).to(tl.int32), 0)
        earlier = time[None, :] < time[:, None]
        beats = (new_score[None, :] > new_score[:, None]) | ((new_score[None, :] == new_score[:, None]) & earlier)
        beaten = ahead[:, None] + tl.cumsum(beats.to(tl.int32), 1)
        held_for = tl.sum((beaten < PP).to(tl.int32), 1)
        tl.store(until + pairs + new, begin + held_for, mask=(new < n) & (held_for < C))
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


def select(scores: Tensor, pairs: int, block: int) -> tuple[Tensor, Tensor, bool]:
    """What is kept when each block begins and at the end, [B, KV, n + 1, P] int32, and `until` of `Selection`, int32.

    For scores [B, KV, P + N]; `block` is a multiple of `ARRIVALS`. The last result says whether the best are the first
    of what is kept, else the latest are.
    """
    best_first = scores.shape[-1] > SHORT
    return *(_select_long if best_first else _select_short)(scores.contiguous(), pairs, block), best_first


def _select_short(scores: Tensor, pairs: int, block: int) -> tuple[Tensor, Tensor]:
    batch, kv_heads, count = scores.shape
    n = count - pairs
    blocks = pieces(n, block)
    # Zeros: of scores that are NaN fewer may be listed than there are places.
    orders = torch.zeros(batch, kv_heads, blocks + 1, pairs, dtype=torch.int32, device=scores.device)
    until = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    with device_of(scores):
        on(_count, (pieces(count, TILE), batch * kv_heads))(scores, until, n, pairs, T=TILE, OTHERS=OTHERS, num_warps=4)
        on(_list, (blocks + 1, batch * kv_heads))(until, orders, n, pairs, block, T=LISTED, num_warps=4)
    return orders, until


def _select_long(scores: Tensor, pairs: int, block: int) -> tuple[Tensor, Tensor]:
    batch, kv_heads, count = scores.shape
    n, padded = count - pairs, max(16, next_power(pairs))
    queries = arrivals(padded)
    blocks, steps, length = pieces(n, block), pieces(n, queries), _segment(n, batch * kv_heads, block)
    starts = _starts(scores, pairs, length)
    spare = torch.zeros(*starts.shape[:-1], padded - pairs, dtype=torch.int32, device=scores.device)
    order = torch.zeros(batch, kv_heads, blocks + 1, padded, dtype=torch.int32, device=scores.device)
    order[:, :, 0, padded - pairs :] = starts[:, :, 0]
    until = torch.full(scores.shape, n, dtype=torch.int32, device=scores.device)
    with device_of(scores):
        on(_select, (batch * kv_heads, starts.shape[2]))(
            scores, torch.cat([spare, starts], -1), order, until, n, pairs, steps, length // queries,
            PP=padded, C=queries, STEPS=block // queries, num_warps=8,
        )  # fmt: skip
    return order[..., padded - pairs :], until


def _segment(n: int, heads: int, block: int) -> int:
    """Queries of a segment, a multiple of those of a block."""
    segments = max(1, min(PROGRAMS // heads, n // SHORTEST_SEGMENT))
    return pieces(pieces(n, segments), block) * block


def _starts(scores: Tensor, pairs: int, length: int) -> Tensor:
    """The pairs kept where each segment of `length` queries begins, best first: [B, KV, segments, P] int32.

    Those of all that came before: of pairs held and of segments, each is first sorted, and then what is kept of ever
    longer stretches is merged with what is kept of those before them, in as many rounds as their number has bits.
    """
    held, leaving = scores[..., :pairs], scores[..., pairs:]
    whole = (leaving.shape[-1] - 1) // length  # segments that another one follows
    kept, index = (x[:, :, None] for x in held.sort(dim=-1, descending=True, stable=True))
    if whole:
        cut = leaving[..., : whole * length].unflatten(-1, (whole, length))
        best, place = (x[..., :pairs] for x in cut.sort(dim=-1, descending=True, stable=True))
        place = place + torch.arange(pairs, pairs + whole * length, length, device=scores.device)[:, None]
        # What a segment lacks is worth nothing, and comes behind the pairs held: it is in no result.
        lacking = 0, max(0, pairs - length)
        kept = torch.cat([kept, nnf.pad(best, lacking, value=-float("inf"))], 2)
        index = torch.cat([index, nnf.pad(place, lacking)], 2)
    index, reach = index.int(), 1
    while reach <= whole:
        # Those of before stand first, so that of equal ones the earlier is kept.
        both, order = torch.cat([kept[:, :, :-reach], kept[:, :, reach:]], -1).sort(
            dim=-1, descending=True, stable=True
        )
        merged = torch.cat([index[:, :, :-reach], index[:, :, reach:]], -1).gather(-1, order[..., :pairs])
        kept = torch.cat([kept[:, :, :reach], both[..., :pairs]], 2)
        index = torch.cat([index[:, :, :reach], merged], 2)
        reach *= 2
    return index
