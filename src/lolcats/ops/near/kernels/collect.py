"""What `several` reads and writes by numbers that its key heads have each their own: scores of the keys that leave, and
the states after a call, slot by slot. In torch these are some 70 operations on indices.

Numbers of keys are those of `several`: of key head h first the ring of the state in order (w_h keys), then the new
tokens. So number i is in row (start + i) mod w_h of the ring, or new token i - w_h.

Legend: B texts, KV key heads, N tokens; W and P the most slots of a ring and kept pairs that a key head has; s sinks; K
and V numbers of a stored key and value.
Bytes: scores twice; what is in the states once read and once written.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats.ops.devices import device_of
from lolcats.ops.hybrid.kernels.launch import next_power, on, pieces, strides
from lolcats.ops.near.head_sizes import Ends, HeadSizes, Slots
from lolcats.ops.near.types import NearState

QUERIES = 256
"""Of a program of `leaving_kernel`."""
STEPS = ["k_b", "k_h", "k_n", "v_b", "v_h", "v_n"]
"""Rows of bytes begin anywhere, so what divides their strides is of no use."""


@triton.jit(do_not_specialize=["tokens", "sinks", "ring_b", "ring_h"])
def leaving_kernel(
    score, ring, told, start, real, out, ring_b, ring_h, tokens, sinks, KV_HEADS: tl.constexpr, QUERIES: tl.constexpr
):  # fmt: skip
    """Score of the key that leaves with each query; grid (N / QUERIES, B KV)."""
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // KV_HEADS, row % KV_HEADS
    window = tl.load(told + 2 * head).to(tl.int64)
    begin = tl.load(start + batch)
    query = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    inside = query < tokens
    leaves = inside & (begin + query - window >= sinks) & (query < tl.load(real + batch))
    held = leaves & (query < window)
    mark = tl.load(ring + batch * ring_b + head * ring_h + (begin + query) % window, mask=held, other=-float("inf"))
    new = leaves & (query >= window)
    mark = tl.where(new, tl.load(score + row * tokens + query - window, mask=new, other=0.0), mark)
    tl.store(out + row * tokens + query, mark, mask=inside)


@triton.jit
def copy_row(new, other, to, new_at, other_at, is_new, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A row of SIZE numbers, from what is new or from the other tensor."""
    column = tl.arange(0, BLOCK)
    from_new = column < tl.where(is_new, SIZE, 0)
    from_other = column < tl.where(is_new, 0, SIZE)
    x = tl.load(new + new_at + column, mask=from_new, other=0)
    y = tl.load(other + other_at + column, mask=from_other, other=0)
    tl.store(to + column, tl.where(from_new, x, y), mask=column < SIZE)


@triton.jit
def collect_slot(
    new_k, new_v, score, leaving, ring_k, ring_v, ring_score, kept_k, kept_v, kept_score, kept_position, after, start,
    real, ring_table, kept_table, out_k, out_v, out_score, out_position, slot, batch, k_b, k_h, k_n, v_b, v_h, v_n,
    after_b, after_h, tokens, rings, slots, most_window, most_pairs, KV_HEADS: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, IS_FRESH: tl.constexpr,
):  # fmt: skip
    """A slot of a ring, or behind all of these one of the kept pairs. `out_k` and `out_v` are the rows of the slot."""
    is_ring = slot < rings
    place = tl.where(is_ring, slot, slot - rings)
    pairs = slots - rings
    kept_slot = is_ring == 0
    head = tl.load(ring_table + place, mask=is_ring, other=0) + tl.load(kept_table + place, mask=kept_slot, other=0)
    own = tl.load(ring_table + rings + place, mask=is_ring, other=0)
    own += tl.load(kept_table + pairs + place, mask=kept_slot, other=0)
    window = tl.load(ring_table + 2 * rings + place, mask=is_ring, other=0)
    window += tl.load(kept_table + 2 * pairs + place, mask=kept_slot, other=0)
    begin, count = tl.load(start + batch), tl.load(real + batch)
    row = batch * KV_HEADS + head

    found = tl.load(after + batch * after_b + head * after_h + own, mask=kept_slot, other=0).to(tl.int64)
    behind = (own - begin - count) % window  # its sign is that of the first
    behind = tl.where(behind < 0, behind + window, behind)
    number = tl.where(is_ring, count + behind, found - most_pairs)
    stays = kept_slot & (found < most_pairs)
    is_new = (number >= window) & (stays == 0)
    token = tl.where(is_new, number - window, 0)
    in_ring = row * most_window + tl.where(number >= 0, (begin + number) % window, 0)
    in_kept = row * most_pairs + tl.where(stays, found, 0)
    if IS_FRESH:
        in_ring *= 0
        in_kept *= 0
    new_at = batch * k_b + head * k_h + token * k_n
    if stays:
        copy_row(new_k, kept_k, out_k, new_at, in_kept * K, is_new, K, BK)
        copy_row(new_v, kept_v, out_v, new_at, in_kept * V, is_new, V, BV)
    else:
        copy_row(new_k, ring_k, out_k, new_at, in_ring * K, is_new, K, BK)
        new_at = batch * v_b + head * v_h + token * v_n
        copy_row(new_v, ring_v, out_v, new_at, in_ring * V, is_new, V, BV)

    mark = tl.load(score + row * tokens + token, mask=is_ring & is_new, other=0.0)
    mark += tl.load(ring_score + in_ring, mask=is_ring & (is_new == 0), other=0.0)
    came = kept_slot & (stays == 0)
    if IS_FRESH:
        mark = tl.where(stays, -float("inf"), mark)
    else:
        mark = tl.where(stays, tl.load(kept_score + in_kept, mask=stays, other=0.0), mark)
    at = row * tokens + tl.where(came, found - most_pairs, 0)
    mark = tl.where(came, tl.load(leaving + at, mask=came, other=0.0), mark)
    tl.store(out_score + batch * slots + slot, mark)
    position = (begin + number).to(tl.int32) - window.to(tl.int32)
    position = tl.where(stays, tl.load(kept_position + in_kept, mask=stays, other=0), position)
    tl.store(out_position + batch * pairs + place, position, mask=kept_slot)


@triton.jit
def collect_sink(
    new_k, new_v, held_k, held_v, start, order, out_k, out_v, place, batch, k_b, k_h, k_n, v_b, v_h, v_n, tokens,
    KV_HEADS: tl.constexpr, SINKS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    IS_FRESH: tl.constexpr,
):  # fmt: skip
    """One of the first tokens of a text, of before or new: number `place` of a row's KV s, key heads part by part."""
    head, sink = tl.load(order + place // SINKS), place % SINKS
    token = sink - tl.load(start + batch)
    is_new = (token >= 0) & (token < tokens)
    token = tl.where(is_new, token, 0)
    held = (batch * KV_HEADS + head) * SINKS + sink
    if IS_FRESH:
        held *= 0
    copy_row(new_k, held_k, out_k, batch * k_b + head * k_h + token * k_n, held * K, is_new, K, BK)
    copy_row(new_v, held_v, out_v, batch * v_b + head * v_h + token * v_n, held * V, is_new, V, BV)


@triton.jit(do_not_specialize=[*STEPS, "after_b", "after_h", "tokens", "rings", "slots", "most_window", "most_pairs"])
def collect_kernel(
    new_k, new_v, score, leaving, ring_k, ring_v, ring_score, kept_k, kept_v, kept_score, kept_position, sink_k, sink_v,
    after, start, real, ring_table, kept_table, order, out_k, out_v, out_score, out_position,
    k_b, k_h, k_n, v_b, v_h, v_n, after_b, after_h, tokens, rings, slots, most_window, most_pairs,
    KV_HEADS: tl.constexpr, SINKS: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    IS_FRESH: tl.constexpr,
):  # fmt: skip
    """A row of keys and values of the states; grid (slots and behind them KV s sinks, B).

    The tables are `HeadSizes.ring` and `kept`. With IS_FRESH nothing was held: one row of each tensor stands for all.
    """
    slot = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    to = batch * tl.num_programs(0) + slot
    out_k += to * K
    out_v += to * V
    if slot < slots:
        collect_slot(
            new_k, new_v, score, leaving, ring_k, ring_v, ring_score, kept_k, kept_v, kept_score, kept_position, after,
            start, real, ring_table, kept_table, out_k, out_v, out_score, out_position, slot, batch,
            k_b, k_h, k_n, v_b, v_h, v_n, after_b, after_h, tokens, rings, slots, most_window, most_pairs,
            KV_HEADS, K, BK, V, BV, IS_FRESH,
        )  # fmt: skip
    elif SINKS > 0:
        collect_sink(
            new_k, new_v, sink_k, sink_v, start, order, out_k, out_v, slot - slots, batch,
            k_b, k_h, k_n, v_b, v_h, v_n, tokens, KV_HEADS, SINKS, K, BK, V, BV, IS_FRESH,
        )  # fmt: skip


def leaving_scores(score: Tensor, ring: Tensor, sizes: HeadSizes, ends: Ends, sinks: int) -> Tensor:
    """[B, KV, N], the score of the key that leaves with each query; of sinks and at padding minus infinity.

    Args:
        score: [B, KV, N], of the new keys; ring: [B, KV, W], of those in the ring of the state.
        sizes: of the key heads.
        ends: of the texts.
        sinks: s.
    """
    (batch, kv_heads, tokens), out = score.shape, torch.empty_like(score)
    # What a fresh text has in its ring never leaves.
    steps = (0, 0) if ends.is_fresh else (ring.stride(0), ring.stride(1))
    with device_of(score):
        on(leaving_kernel, (pieces(tokens, QUERIES), batch * kv_heads))(
            score, ring, sizes.told, ends.start, ends.real, out, *steps, tokens, sinks, KV_HEADS=kv_heads,
            QUERIES=QUERIES,
        )  # fmt: skip
    return out


def collect_slots(
    new: Sequence[Tensor], held: NearState, score: Tensor, leaving: Tensor, after: Tensor, sizes: HeadSizes, ends: Ends,
    sinks: int,
) -> Slots:  # fmt: skip
    """Rings, kept pairs and sinks after a call.

    Args:
        new: keys [B, KV, N, K] and values [B, KV, N, V] as the state has them.
        held: what came before, with scores and W slots and P kept pairs for each key head; of a fresh text one slot of
            one key head stands for all, and no kept pair is more than an empty slot.
        score: [B, KV, N]; leaving: [B, KV, N], of `leaving_scores`.
        after: [B, KV, P], candidates that are kept at the end.
        sizes: of the key heads.
        ends: of the texts.
        sinks: s.
    """
    kept = held.kept
    assert kept is not None and held.ring.score is not None
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in new)
    after = after if after.stride(-1) == 1 else after.contiguous()
    batch, kv_heads, tokens, rings, slots = *score.shape, sizes.ring.shape[1], sizes.ring.shape[1] + sizes.kept.shape[1]
    rows = slots + kv_heads * sinks
    out_k, out_v = (torch.empty(batch, rows, x.shape[3], dtype=x.dtype, device=x.device) for x in (k, v))
    marks = torch.empty(batch, slots, dtype=score.dtype, device=score.device)
    position = torch.empty(batch, slots - rings, dtype=torch.int32, device=score.device)
    before = [x for x in (*held.ring, *kept, *(held.sinks or kept[:2])) if x is not None]
    before = before if ends.is_fresh else [x.contiguous() for x in before]
    with device_of(score):
        on(collect_kernel, (rows, batch))(
            k, v, score, leaving, *before, after, ends.start, ends.real, sizes.ring, sizes.kept, sizes.order, out_k,
            out_v, marks, position, *strides(k), *strides(v), after.stride(0), after.stride(1), tokens, rings, slots,
            sizes.most_window, sizes.most_pairs, KV_HEADS=kv_heads, SINKS=sinks, **_row_sizes(k, v),
            IS_FRESH=ends.is_fresh, num_warps=1,
        )  # fmt: skip
    return Slots(out_k, out_v, marks, position)


def _row_sizes(k: Tensor, v: Tensor) -> dict[str, int]:
    sizes = {"K": k.shape[3], "V": v.shape[3]}
    return sizes | {f"B{name}": next_power(size) for name, size in sizes.items()}
