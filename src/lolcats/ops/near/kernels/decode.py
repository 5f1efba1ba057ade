"""One decoding step in place: the oldest pair may enter the kept ones, the new token enters the ring, the output.

Algorithm, in two kernels for all key heads of a layer, whose sizes may differ:
1. `near_decode`: a program has a part of what a text and a key head see: softmax of the group's query heads over tiles
   of kept pairs, then of the ring, with a running row maximum. The first program also has the new token and the sinks.
   The pair that leaves stands in the slot of the ring that the new token will take; it is seen if its score is higher
   than the lowest kept one, and then that one is not;
2. `near_finish`: what the programs of a head have found is joined, and, as all has been read, what has entered is
   written and the token is counted.
Which slots are filled follows from the length of the text and, of kept pairs, from their scores. With `indices` the
states are a pool of which text b has row indices[b], or none (-1). The rows of a tensor may lie apart, as in the pages
of a serving engine. Where the tensors of a key head lie, and its sizes, stand in a table on the device (`head_table`).

Shapes: q, out [B, H, D or Dv]; ring [rows, heads, w, .], kept [rows, heads, P, .], sinks [rows, heads, s, .].
Bytes: the state once read, KV (w + P + s) (D + Dv) numbers per text. Numbers of 8 or 4 bits (`PairCodec`) are decoded
in registers, and pairs move from place to place as the bytes that they are. Keys and values are those that were coded,
scaled and mixed: the kernel is given queries that the codec maps, and its output is mapped back at the end.
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

from lolcats.ops.hybrid.kernels.decode import ring_positions, state_row
from lolcats.ops.hybrid.kernels.launch import SMALLEST, either, on, padded, precision
from lolcats.ops.hybrid.kernels.tiles import LOG2E, load_tile
from lolcats.ops.hybrid.layout import ROWS_APART, contiguous_rows
from lolcats.ops.near.kernels.launch import device_of, refusal
from lolcats.ops.near.kernels.spread import mixed_rows
from lolcats.ops.near.kernels.tiles import capped
from lolcats.ops.near.quantize import CURVE as LEVEL_CURVE
from lolcats.ops.near.quantize import STEP_BYTES as BYTES_OF_STEP
from lolcats.ops.near.quantize import PairCodec, spread
from lolcats.ops.near.types import NearPart

LARGEST_PAIRS = 4096
"""Scores of kept pairs that a program holds in registers."""
KEYS = 64
"""Slots of a tile."""
PROGRAMS = 800
"""That a kernel is cut into where there is enough to do: some for each multiprocessor of a large GPU."""
LARGEST_PART, MOST_PARTS = 8, 32
"""Tiles of a program at most, unless a head had more than so many programs."""
JOINED = 8
"""Programs of a head that are joined at once."""
CURVE, STEP_BYTES = tl.constexpr(LEVEL_CURVE), tl.constexpr(BYTES_OF_STEP)

COLUMNS = tl.constexpr(23)
"""Of `head_table`: addresses of ring k, v and score, of kept k, v, score and position, of sinks k and v, and of the
lengths; the distances of their rows; window, pairs, and the number of the key head among those of these sizes."""
KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.uint8: tl.uint8}


@triton.jit
def read_float16(base, inside):
    """The float16 whose two bytes are at `base` [K] of bytes, as float32."""
    low = tl.load(base, mask=inside, other=0).to(tl.int16)
    high = tl.load(base + 1, mask=inside, other=0).to(tl.int16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def read_bytes(base, first, inside, size: tl.constexpr, block: tl.constexpr):
    """Bytes [K, block] from `first` [K] on, four at a time, wherever they begin; `base` is a multiple of 4."""
    words = base.to(tl.pointer_type(tl.uint32), bitcast=True)
    column = tl.arange(0, block // 4)
    mask = inside[:, None] & (column < size // 4)[None, :]
    at = words + (first >> 2)[:, None] + column[None, :]
    shift = ((first & 3) * 8).to(tl.uint32)[:, None]
    low = tl.load(at, mask=mask, other=0)
    high = tl.load(at + 1, mask=mask & (shift > 0), other=0)
    word = (low >> shift) | ((high << (31 - shift)) << 1)
    even = tl.interleave(word & 255, (word >> 16) & 255)
    return tl.interleave(even, tl.interleave((word >> 8) & 255, word >> 24))


@triton.jit
def read_pairs(
    base, start, slot, inside, like,
    width: tl.constexpr, size: tl.constexpr, block: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Keys or values of `slot` [K] of rows of `width` as a tile [K, block] in the dtype of `like`, and a factor [K].

    Rows of fewer bits end in the step of a token; before it is that of the first WIDE numbers, which have 8 bits. Of
    rows of 8 bits it is the factor, and the tile has levels, which are exact in 8 bits of mantissa.
    """
    column = tl.arange(0, block)
    mask = inside[:, None] & (column < size)[None, :]
    first = start + slot * width
    factor = tl.where(inside, 1.0, 0.0)
    if BITS == 16:
        tile = tl.load(base + first[:, None] + column[None, :], mask=mask, other=0)
    elif BITS == 8:
        if size % 4 == 0:
            code = read_bytes(base, first, inside, size, block)
        else:
            code = tl.load(base + first[:, None] + column[None, :], mask=mask, other=0)
        tile = tl.where(mask, code.to(tl.float32) - 127.5, 0.0)
        factor = read_float16(base + first + (width - STEP_BYTES), inside)
    else:
        step = read_float16(base + first + (width - STEP_BYTES), inside)
        is_wide = column < WIDE
        at = tl.where(is_wide, column, WIDE + (column - WIDE) // 2)
        byte = tl.load(base + first[:, None] + at[None, :], mask=mask, other=0).to(tl.int32)
        u = ((byte >> ((column % 2) * 4)[None, :]) & 15).to(tl.float32) - 7.5  # WIDE is even
        tile = u * (1 + CURVE * u * u) * step[:, None]
        if WIDE > 0:
            wide_step = read_float16(base + first + (width - 2 * STEP_BYTES), inside)
            tile = tl.where(is_wide[None, :], (byte.to(tl.float32) - 127.5) * wide_step[:, None], tile)
        tile = tl.where(mask, tile, 0.0)
    return tile.to(like.dtype), factor


@triton.jit
def add_pairs(
    top, denominator, acc, q_tile, key, at_key, value, at_value, slot, inside, seen, scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr,
    WK: tl.constexpr, WV: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`add_softmax` of the pairs in `slot` [K] that are seen [K]; only those `inside` are read."""
    keys, k_factor = read_pairs(key, at_key, slot, inside, q_tile, WK, D, BD, BITS, WIDE)
    values, v_factor = read_pairs(value, at_value, slot, inside, q_tile, WV, DV, BV, BITS, 0)
    products = tl.dot(q_tile, tl.trans(keys), input_precision=PRECISION) * k_factor[None, :]
    s = tl.where(seen[None, :], capped(products, scale, SOFTCAP), -float("inf"))
    new = tl.maximum(top, tl.max(s, 1))
    finite = tl.where(new == -float("inf"), 0.0, new)
    faded = tl.exp2(top - finite)
    weights = tl.exp2(s - finite[:, None])
    denominator = denominator * faded + tl.sum(weights, 1)
    weights = (weights * v_factor[None, :]).to(values.dtype)
    acc = tl.dot(weights, values, acc * faded[:, None], input_precision=PRECISION)
    return new, denominator, acc


@triton.jit
def sizes_of(table, part, K: tl.constexpr):
    """Of a key head: its number among those of its sizes, window, pairs, tiles of pairs, programs of `part` tiles."""
    window = tl.load(table + 20).to(tl.int32)
    pairs = tl.load(table + 21).to(tl.int32)
    inner = tl.load(table + 22)
    kept_tiles = (pairs + K - 1) // K
    programs = (kept_tiles + (window + K - 1) // K + part - 1) // part
    return inner, window, pairs, kept_tiles, programs


@triton.jit
def place(table, text, inner, column: tl.constexpr, kind: tl.constexpr):
    """Of a key head: the address of tensor `column`, of numbers of a kind, and where a text's numbers begin.

    Args:
        inner: numbers before those of the key head in a row.
    """
    address = tl.load(table + column)
    start = text * tl.load(table + 10 + column) + inner
    if kind == tl.uint8:  # `read_bytes` wants a multiple of 4
        start += address & 3
        address -= address & 3
    return address.to(tl.pointer_type(kind)), start


NUMBERS = ["reach", "part", "splits"]


@triton.jit(do_not_specialize=NUMBERS)
def near_decode(
    q, k, v, sink_q, active, indices, table, sums, tops, changes,
    q_b, q_h, k_b, k_h, v_b, v_h, reach, scale, part, splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    BITS: tl.constexpr, WIDE: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, KIND: tl.constexpr,
    SINKS: tl.constexpr, BS: tl.constexpr, HAS_PAIRS: tl.constexpr, BP: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_ACTIVE: tl.constexpr, HAS_INDICES: tl.constexpr,
    HAS_SINK_Q: tl.constexpr, HAS_REACH: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (batch, key heads, splits): numerators, [maximum, denominator], and by the first what will change."""
    batch = tl.program_id(0).to(tl.int64)
    head, split = tl.program_id(1), tl.program_id(2)
    table += head * COLUMNS
    text, alive = state_row(active, indices, batch, HAS_ACTIVE, HAS_INDICES)
    inner, window, pairs, kept_tiles, programs = sizes_of(table, part, K)
    if (alive == 0) | (split >= programs):
        return
    length, at_length = place(table, text, 0, 9, tl.int64)
    now = tl.load(length + at_length).to(tl.int32)
    own = now % window  # slot of the new token, so far of the oldest
    ring_k, at_ring_k = place(table, text, inner * window * WK, 0, KIND)
    ring_v, at_ring_v = place(table, text, inner * window * WV, 1, KIND)
    kept_k, at_kept_k = place(table, text, inner * pairs * WK, 3, KIND)
    kept_v, at_kept_v = place(table, text, inner * pairs * WV, 4, KIND)
    if ALIGNED:
        ring_k, ring_v = tl.multiple_of(ring_k, 16), tl.multiple_of(ring_v, 16)
        kept_k, kept_v = tl.multiple_of(kept_k, 16), tl.multiple_of(kept_v, 16)
        at_ring_k, at_ring_v = tl.multiple_of(at_ring_k, 16), tl.multiple_of(at_ring_v, 16)
        at_kept_k, at_kept_v = tl.multiple_of(at_kept_k, 16), tl.multiple_of(at_kept_v, 16)
    worst = window * 0
    enters = window < 0
    if HAS_PAIRS:
        kept_score, at_score = place(table, text, inner * pairs, 5, tl.float32)
        kept_position, at_position = place(table, text, inner * pairs, 6, tl.int32)
        ring_score, at_ring_score = place(table, text, inner * window, 2, tl.float32)
        order = tl.arange(0, BP)
        marks = tl.load(kept_score + at_score + order, mask=order < pairs, other=float("inf"))
        since = tl.load(kept_position + at_position + order, mask=order < pairs, other=-1)
        left = tl.load(ring_score + at_ring_score + own, mask=pairs > 0, other=-float("inf"))
        lowest = tl.min(marks, 0)
        enters = (now - window >= SINKS) & (left > lowest)
        # Of equal ones the latest goes, as in a text that is read at once.
        since = tl.where(marks == lowest, since, -1)
        worst = tl.min(tl.where(since == tl.max(since, 0), order, BP), 0)
        kept_score += at_score
        kept_position += at_position
    begins = split == 0
    if begins:
        to = changes + (batch * KV_HEADS + head) * 3
        tl.store(to, now)
        tl.store(to + 1, worst)
        tl.store(to + 2, enters.to(tl.int32))

    q_tile = load_tile(q + batch * q_b + head * GROUP * q_h, q_h, 0, GROUP, 0, BG, D, BD)
    sink_tile, new_tile = q_tile, q_tile
    if HAS_SINK_Q:
        sink_tile = load_tile(sink_q + (batch * KV_HEADS + head) * GROUP * D, D, 0, GROUP, 0, BG, D, BD)
        new_tile = tl.where(now < SINKS, sink_tile, q_tile)
    one = tl.arange(0, 1)
    k_new, k_factor = read_pairs(k, batch * k_b + head * k_h, one, one < 1, q_tile, WK, D, BD, BITS, WIDE)
    v_new, v_factor = read_pairs(v, batch * v_b + head * v_h, one, one < 1, q_tile, WV, DV, BV, BITS, 0)
    products = tl.sum(new_tile.to(tl.float32) * k_new.to(tl.float32), 1) * tl.sum(k_factor, 0)
    top = tl.where(begins, capped(products, scale, SOFTCAP), -float("inf"))
    denominator = tl.where(begins, 1.0, 0.0) + tl.zeros((BG,), tl.float32)
    acc = denominator[:, None] * (v_new.to(tl.float32) * tl.sum(v_factor, 0))
    if SINKS > 0:
        sink = tl.arange(0, BS)
        there = sink < tl.where(begins, tl.minimum(now, SINKS), 0)
        sink_k, at_sink_k = place(table, text, inner * SINKS * WK, 7, KIND)
        sink_v, at_sink_v = place(table, text, inner * SINKS * WV, 8, KIND)
        top, denominator, acc = add_pairs(
            top, denominator, acc, sink_tile, sink_k, at_sink_k, sink_v, at_sink_v, sink, there, there, scale,
            D, BD, DV, BV, BITS, WIDE, WK, WV, SOFTCAP, PRECISION,
        )  # fmt: skip
    first_tile, end_tile = split * part, split * part + part
    if HAS_PAIRS:
        for tile in tl.range(first_tile, tl.minimum(end_tile, kept_tiles), 1, num_stages=STAGES):
            slot = tile * K + tl.arange(0, K)
            inside = slot < pairs
            seen = tl.load(kept_score + slot, mask=inside, other=-float("inf")) > -float("inf")
            seen = seen & ((slot != worst) | (enters == 0))
            if HAS_REACH:
                seen = seen & (now - tl.load(kept_position + slot, mask=inside, other=0) < reach)
            top, denominator, acc = add_pairs(
                top, denominator, acc, q_tile, kept_k, at_kept_k, kept_v, at_kept_v, slot, inside, seen, scale,
                D, BD, DV, BV, BITS, WIDE, WK, WV, SOFTCAP, PRECISION,
            )  # fmt: skip
    ring_end = kept_tiles + (window + K - 1) // K
    for tile in tl.range(tl.maximum(first_tile, kept_tiles), tl.minimum(end_tile, ring_end), 1, num_stages=STAGES):
        slot = (tile - kept_tiles) * K + tl.arange(0, K)
        position, seen = ring_positions(now, slot, window, False, window)
        seen = seen & (position >= SINKS) & (slot != own)
        if HAS_PAIRS:
            leaving = (slot == own) & enters
            if HAS_REACH:
                leaving = leaving & (window < reach)
            seen = seen | leaving
        top, denominator, acc = add_pairs(
            top, denominator, acc, q_tile, ring_k, at_ring_k, ring_v, at_ring_v, slot, slot < window, seen, scale,
            D, BD, DV, BV, BITS, WIDE, WK, WV, SOFTCAP, PRECISION,
        )  # fmt: skip
    g = tl.arange(0, BG)
    row = ((batch * KV_HEADS + head) * splits + split) * GROUP + g
    tl.store(tops + row * 2, top, mask=g < GROUP)
    tl.store(tops + row * 2 + 1, denominator, mask=g < GROUP)
    column = tl.arange(0, BV)
    inside = (g < GROUP)[:, None] & (column < DV)[None, :]
    tl.store(sums + row[:, None] * DV + column[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def near_finish(
    k, v, score, sink_logits, active, indices, table, sums, tops, changes, out,
    k_b, k_h, v_b, v_h, part, splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    WK: tl.constexpr, BWK: tl.constexpr, WV: tl.constexpr, BWV: tl.constexpr, KIND: tl.constexpr,
    SINKS: tl.constexpr, HAS_PAIRS: tl.constexpr, LEARNED: tl.constexpr,
    HAS_ACTIVE: tl.constexpr, HAS_INDICES: tl.constexpr, LEVELS: tl.constexpr, FACTOR: tl.constexpr,
    K: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Grid: (batch, key heads)."""
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    table += head * COLUMNS
    text, alive = state_row(active, indices, batch, HAS_ACTIVE, HAS_INDICES)
    if alive == 0:
        return
    inner, window, pairs, _, programs = sizes_of(table, part, K)
    g = tl.arange(0, BG)
    column = tl.arange(0, BV)
    top = tl.full((BG,), -float("inf"), tl.float32)
    denominator = tl.zeros((BG,), tl.float32)
    if LEARNED:
        top = tl.load(sink_logits + head * GROUP + g, mask=g < GROUP, other=0.0).to(tl.float32) * LOG2E
        denominator += 1.0
    acc = tl.zeros((BG, BV), tl.float32)
    own_rows = (batch * KV_HEADS + head) * splits
    for first in tl.range(0, programs, J):
        program = first + tl.arange(0, J)
        inside = (program < programs)[:, None] & (g < GROUP)[None, :]
        row = (own_rows + program)[:, None] * GROUP + g[None, :]
        tops_of = tl.load(tops + row * 2, mask=inside, other=-float("inf"))
        sums_of = tl.load(tops + row * 2 + 1, mask=inside, other=0.0)
        both = inside[:, :, None] & (column < DV)[None, None, :]
        values = tl.load(sums + row[:, :, None] * DV + column[None, None, :], mask=both, other=0.0)
        new = tl.maximum(top, tl.max(tops_of, 0))
        finite = tl.where(new == -float("inf"), 0.0, new)
        faded, weights = tl.exp2(top - finite), tl.exp2(tops_of - finite[None, :])
        denominator = denominator * faded + tl.sum(sums_of * weights, 0)
        acc = acc * faded[:, None] + tl.sum(values * weights[:, :, None], 0)
        top = new
    y = acc / tl.where(denominator > 0, denominator, 1.0)[:, None]
    if LEVELS > 0:
        y = mixed_rows(y, BV, LEVELS, BG) * FACTOR
    to = out + ((batch * KV_HEADS + head) * GROUP + g)[:, None] * DV + column[None, :]
    tl.store(to, y.to(out.dtype.element_ty), mask=(g < GROUP)[:, None] & (column < DV)[None, :])

    change = changes + (batch * KV_HEADS + head) * 3
    now = tl.load(change)
    own = now % window
    kc, vc = tl.arange(0, BWK), tl.arange(0, BWV)
    is_k, is_v = kc < WK, vc < WV
    ring_k, at_k = place(table, text, inner * window * WK, 0, KIND)
    ring_v, at_v = place(table, text, inner * window * WV, 1, KIND)
    ring_k, ring_v = ring_k + at_k + own * WK, ring_v + at_v + own * WV
    k_new = tl.load(k + batch * k_b + head * k_h + kc, mask=is_k, other=0)
    v_new = tl.load(v + batch * v_b + head * v_h + vc, mask=is_v, other=0)
    if HAS_PAIRS:
        worst, enters = tl.load(change + 1), tl.load(change + 2) != 0
        k_moved, v_moved = tl.load(ring_k + kc, mask=is_k, other=0), tl.load(ring_v + vc, mask=is_v, other=0)
        ring_score, at_score = place(table, text, inner * window, 2, tl.float32)
        ring_score += at_score + own
        left = tl.load(ring_score, mask=enters, other=0.0)
        tl.debug_barrier()  # what leaves is read before it is written over
        kept_k, at_k = place(table, text, inner * pairs * WK, 3, KIND)
        kept_v, at_v = place(table, text, inner * pairs * WV, 4, KIND)
        tl.store(kept_k + at_k + worst * WK + kc, k_moved, mask=kc < tl.where(enters, WK, 0))
        tl.store(kept_v + at_v + worst * WV + vc, v_moved, mask=vc < tl.where(enters, WV, 0))
        kept_score, at_kept = place(table, text, inner * pairs, 5, tl.float32)
        tl.store(kept_score + at_kept + worst, left, mask=enters)
        kept_position, at_kept = place(table, text, inner * pairs, 6, tl.int32)
        tl.store(kept_position + at_kept + worst, now - window, mask=enters)
        mark = tl.load(score + batch * KV_HEADS + head, mask=pairs > 0, other=0.0)
        tl.store(ring_score, mark, mask=pairs > 0)
    tl.store(ring_k + kc, k_new.to(KIND), mask=is_k)
    tl.store(ring_v + vc, v_new.to(KIND), mask=is_v)
    if SINKS > 0:
        sink_k, at_k = place(table, text, inner * SINKS * WK, 7, KIND)
        sink_v, at_v = place(table, text, inner * SINKS * WV, 8, KIND)
        tl.store(sink_k + at_k + now * WK + kc, k_new.to(KIND), mask=kc < tl.where(now < SINKS, WK, 0))
        tl.store(sink_v + at_v + now * WV + vc, v_new.to(KIND), mask=vc < tl.where(now < SINKS, WV, 0))
    if inner == 0:
        length, at_length = place(table, text, 0, 9, tl.int64)
        tl.store(length + at_length, (now + 1).to(tl.int64))


def step_refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[NearPart],
    in_pool: bool,
    sink_logits: Tensor | None,
    codec: PairCodec | None = None,
) -> str | None:
    """Why `decode_step` does not take a call, or None."""
    numbers = (q, k, v)
    if codec is not None:
        numbers = q, q, q[..., :1].expand(*q.shape[:3], codec.value_size(v.shape[3]))
    if (reason := refusal(*numbers, False, sink_logits)) is not None:
        return reason
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, sink_logits) if x is not None):
        return "it gives no gradients; decode under torch.no_grad()"
    if codec is None and q.dtype != v.dtype:
        return f"it takes queries and values of one dtype; got {q.dtype} and {v.dtype}"
    for part in parts:
        kept = part.state.kept
        if kept is not None and kept.score.dtype != torch.float32:
            return f"it takes scores of float32 in the state; got {kept.score.dtype}"
        if kept is not None and kept.score.shape[2] > LARGEST_PAIRS:
            return f"it takes up to {LARGEST_PAIRS} kept pairs; got {kept.score.shape[2]}"
        if in_pool and not all(contiguous_rows(t) for t in part.state.tensors()):
            return ROWS_APART
    return None


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[NearPart],
    score: Tensor | None = None,
    active: Tensor | None = None,
    sink_logits: Tensor | None = None,
    state_indices: Tensor | None = None,
    codec: PairCodec | None = None,
    sink_q: Tensor | None = None,
    mapped: bool = False,
) -> Tensor:
    """`near_step` of all key heads, with contiguous rows in their states, which are changed in place.

    Args:
        q: [B, H, 1, D]; k: [B, KV, 1, D]; v: [B, KV, 1, Dv]. With a codec k and v are bytes, as it encodes them.
        parts: the key heads by their sizes, all KV of them.
        score: [B, KV, 1], with kept pairs.
        mapped: q and sink_q are as the codec maps them.
        active, sink_logits, state_indices, codec, sink_q: as in `near_step`.

    Returns:
        The output [B, H, 1, Dv].
    """
    (batch, heads, _, size), kv_heads, dv = q.shape, k.shape[1], v.shape[3]
    spec, ring = parts[0].spec, parts[0].state.ring
    if codec is not None:
        dv = codec.value_size(dv)
        if not mapped:
            q = codec.map_queries(q)
            sink_q = None if sink_q is None else codec.map_queries(sink_q)
    group, pairs = heads // kv_heads, max(part.spec.pairs for part in parts)
    q, k, v = (x if x.stride(-1) == 1 and x.data_ptr() % 4 == 0 else _own(x) for x in (q, k, v))
    make = torch.empty if active is None and state_indices is None else torch.zeros
    out = make(batch, heads, 1, dv, dtype=q.dtype, device=q.device)
    score = None if score is None else score.float().contiguous()
    # `active` is often a column of a wide mask.
    active, indices = (None if x is None else x.contiguous() for x in (active, state_indices))
    sink_q = None if sink_q is None else sink_q.to(q.dtype).contiguous()
    part, splits = _cut(parts, batch)
    found = {"dtype": torch.float32, "device": q.device}
    sums, tops = (torch.empty(batch * kv_heads * splits * group, n, **found) for n in (dv, 2))
    changes = torch.empty(batch * kv_heads, 3, dtype=torch.int32, device=q.device)
    wide_dv, of_q, of_table = max(SMALLEST, padded(dv)), padded(group), head_table(parts, q.device)
    levels = dv.bit_length() - 1 if codec is not None and dv == wide_dv else 0
    both = {
        "KV_HEADS": kv_heads, "GROUP": group, "DV": dv, "BV": wide_dv, "WK": k.shape[3], "WV": v.shape[3],
        "KIND": KINDS[ring.k.dtype], "SINKS": spec.sinks, "HAS_PAIRS": pairs > 0, "HAS_ACTIVE": active is not None,
        "HAS_INDICES": indices is not None, "K": KEYS,
    }  # fmt: skip
    with device_of(v):
        on(near_decode, (batch, kv_heads, splits))(
            q, k, v, either(sink_q, q), either(active, q), either(indices, q), of_table, sums, tops, changes,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), spec.reach or 0,
            spec.product_scale(size), part, splits, BG=of_q, D=size, BD=max(SMALLEST, padded(size)),
            BITS=16 if codec is None else codec.bits, WIDE=0 if codec is None else codec.wide(size),
            BS=padded(spec.sinks), BP=padded(pairs), SOFTCAP=float(spec.softcap or 0.0), HAS_SINK_Q=sink_q is not None,
            HAS_REACH=spec.reach is not None, PRECISION=precision(q.dtype), ALIGNED=codec is None and _aligned(parts),
            STAGES=3 if q.element_size() == 2 else 1, num_warps=4, **both,
        )  # fmt: skip
        few = triton.next_power_of_2(group)
        on(near_finish, (batch, kv_heads))(
            k, v, either(score, tops), either(sink_logits, q), either(active, q), either(indices, q), of_table, sums,
            tops, changes, out, k.stride(0), k.stride(1), v.stride(0), v.stride(1), part, splits, BG=few,
            BWK=padded(k.shape[3]), BWV=padded(v.shape[3]), LEARNED=sink_logits is not None, LEVELS=levels,
            FACTOR=dv**-0.5, J=max(1, min(JOINED, 4096 // (few * wide_dv))), num_warps=4, **both,
        )  # fmt: skip
    return out if codec is None or levels else spread(out.float()).to(out.dtype)


def _own(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _cut(parts: Sequence[NearPart], batch: int) -> tuple[int, int]:
    """Tiles of a program, and programs of the largest key head."""
    tiles = [
        triton.cdiv(part.spec.pairs, KEYS) + triton.cdiv(part.spec.window, KEYS) for part in parts for _ in part.heads
    ]
    part = max(1, min(LARGEST_PART, batch * sum(tiles) // PROGRAMS), triton.cdiv(max(tiles), MOST_PARTS))
    return part, triton.cdiv(max(tiles), part)


def _aligned(parts: Sequence[NearPart]) -> bool:
    """Whether keys and values can be read many numbers at a time."""
    stored = [x for part in parts for x in (*part.state.ring[:2], *(part.state.kept or ())[:2])]
    return all(x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.shape[3] % 16 == 0 for x in stored)


def head_table(parts: Sequence[NearPart], device: torch.device) -> Tensor:
    """Where the tensors of each key head lie, and its sizes: [KV, `COLUMNS`] int64.

    It is kept with the first of the tensors that it names: as long as these are where they are, no step makes it anew,
    and a recorded step has it in the same place.
    """
    rows = [_table_row(part) for part in parts]
    key = [*rows, [part.heads for part in parts]]
    holder = parts[0].state.ring.k
    held = getattr(holder, "_head_table", None)
    if held is None or held[0] != key or held[1].device != device:
        by_head = {head: [*row, i] for part, row in zip(parts, rows, strict=True) for i, head in enumerate(part.heads)}
        table = torch.tensor([by_head[head] for head in range(len(by_head))], dtype=torch.int64)
        held = holder._head_table = (key, table.to(device))  # type: ignore[attr-defined]
    return held[1]


def _table_row(part: NearPart) -> list[int]:
    state = part.state
    none = (None,) * 4
    tensors = (*state.ring, *(state.kept or none), *(state.sinks or none[:2]), state.length)
    places = [0 if x is None else x.data_ptr() for x in tensors]
    return [*places, *(0 if x is None else x.stride(0) for x in tensors), part.spec.window, part.spec.pairs]
