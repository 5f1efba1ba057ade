"""One decoding step in place: the oldest pair may enter the kept ones, the new token enters the ring, the output.

Algorithm, in three kernels for all key heads of a layer, whose sizes may differ:
1. `near_begin`: of each text and key head the lowest kept score, and whether the pair that leaves takes its place;
2. `near_decode`: a program has a part of what a text and a key head see: softmax of the group's query heads over tiles
   of kept pairs, then of the ring, with a running row maximum. The first program also has the new token and the sinks.
   The pair that leaves stands in the slot of the ring that the new token will take; it is seen if it enters, and then
   the pair that it replaces is not;
3. `near_finish`: what the programs of a head have found is joined, and, as all has been read, what has entered is
   written and the token is counted.
Which slots are filled follows from the length of the text and, of kept pairs, from their scores. With `indices` the
states are a pool of which text b has row indices[b], or none (-1). The rows of a tensor may lie apart, as in the pages
of a serving engine. Where the tensors of a key head lie, and its sizes, stand in a table on the device
(`decode_launch.head_table`).

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

import triton
import triton.language as tl

from lolcats.ops.hybrid.kernels.decode import state_row
from lolcats.ops.hybrid.kernels.tiles import LOG2E, load_tile
from lolcats.ops.near.kernels.levels import add_codes, columns, halved_queries, read_float16, row_of_levels
from lolcats.ops.near.kernels.spread import mixed_rows
from lolcats.ops.near.kernels.tiles import capped
from lolcats.ops.near.quantize import CURVE as LEVEL_CURVE
from lolcats.ops.near.types import STEP_BYTES as BYTES_OF_STEP

CURVE, STEP_BYTES = tl.constexpr(LEVEL_CURVE), tl.constexpr(BYTES_OF_STEP)

COLUMNS = tl.constexpr(23)
"""Of a head table: addresses of ring k, v and score, of kept k, v, score and position, of sinks k and v, and of the
lengths; the distances of their rows; window, pairs, and the number of the key head among those of these sizes."""


@triton.jit
def ring_positions(now, slot, ring):
    """Positions of the tokens in slots of the ring that holds `now`, and which slots are filled."""
    age = now % ring - slot
    position = now - tl.where(age < 0, age + ring, age)
    return position, (slot < ring) & (position >= 0)


@triton.jit
def read_pairs(
    base, start, slot, inside, like,
    width: tl.constexpr, size: tl.constexpr, block: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Keys or values of `slot` [K] of rows of `width` as a tile [K, block] in the dtype of `like`, and a factor [K].

    Rows of fewer bits end in the step of a token; before it is that of the first WIDE numbers, which have 8 bits. Of
    rows of 8 bits it is the factor, and the tile has levels, which are exact in 8 bits of mantissa. (`levels.py` has
    those faster, where products are of 16 bits.)
    """
    column = tl.arange(0, block)
    mask = inside[:, None] & (column < size)[None, :]
    first = start + slot * width
    factor = tl.where(inside, 1.0, 0.0)
    if BITS == 16:
        tile = tl.load(base + first[:, None] + column[None, :], mask=mask, other=0)
    elif BITS == 8:
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
    if kind == tl.uint8:  # `read_words` wants a multiple of 4
        start += address & 3
        address -= address & 3
    return address.to(tl.pointer_type(kind)), start


NUMBERS = ["reach", "part", "splits"]


@triton.jit
def near_begin(
    active, indices, table, changes,
    KV_HEADS: tl.constexpr, SINKS: tl.constexpr, HAS_PAIRS: tl.constexpr, BP: tl.constexpr,
    HAS_ACTIVE: tl.constexpr, HAS_INDICES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Grid: (batch, key heads): [length, kept slot of the lowest score, whether the pair that leaves enters]."""
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    table += head * COLUMNS
    text, alive = state_row(active, indices, batch, HAS_ACTIVE, HAS_INDICES)
    if alive == 0:
        return
    inner, window, pairs, _, _ = sizes_of(table, 1, K)
    length, at_length = place(table, text, 0, 9, tl.int64)
    now = tl.load(length + at_length).to(tl.int32)
    to = changes + (batch * KV_HEADS + head) * 3
    tl.store(to, now)
    if HAS_PAIRS:
        kept_score, at_score = place(table, text, inner * pairs, 5, tl.float32)
        kept_position, at_position = place(table, text, inner * pairs, 6, tl.int32)
        ring_score, at_ring_score = place(table, text, inner * window, 2, tl.float32)
        order = tl.arange(0, BP)
        marks = tl.load(kept_score + at_score + order, mask=order < pairs, other=float("inf"))
        since = tl.load(kept_position + at_position + order, mask=order < pairs, other=-1)
        left = tl.load(ring_score + at_ring_score + now % window, mask=pairs > 0, other=-float("inf"))
        lowest = tl.min(marks, 0)
        enters = (now - window >= SINKS) & (left > lowest)
        # Of equal ones the latest goes, as in a text that is read at once.
        since = tl.where(marks == lowest, since, -1)
        worst = tl.min(tl.where(since == tl.max(since, 0), order, BP), 0)
        tl.store(to + 1, worst)
        tl.store(to + 2, enters.to(tl.int32))
    else:
        tl.store(to + 1, 0)
        tl.store(to + 2, 0)


@triton.jit(do_not_specialize=NUMBERS)
def near_decode(
    q, k, v, sink_q, active, indices, table, sums, tops, changes,
    q_b, q_h, k_b, k_h, v_b, v_h, reach, scale, part, splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    BITS: tl.constexpr, WIDE: tl.constexpr, WK: tl.constexpr, WV: tl.constexpr, KIND: tl.constexpr,
    SINKS: tl.constexpr, BS: tl.constexpr, HAS_PAIRS: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_ACTIVE: tl.constexpr, HAS_INDICES: tl.constexpr,
    HAS_SINK_Q: tl.constexpr, HAS_REACH: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, K: tl.constexpr,
    STAGES: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Grid: (batch, key heads, splits): numerators, and [maximum, denominator]. CODES: by `add_codes`."""
    batch = tl.program_id(0).to(tl.int64)
    head, split = tl.program_id(1), tl.program_id(2)
    table += head * COLUMNS
    text, alive = state_row(active, indices, batch, HAS_ACTIVE, HAS_INDICES)
    inner, window, pairs, kept_tiles, programs = sizes_of(table, part, K)
    if (alive == 0) | (split >= programs):
        return
    change = changes + (batch * KV_HEADS + head) * 3
    now, worst, enters = tl.load(change), tl.load(change + 1), tl.load(change + 2) != 0
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
    if HAS_PAIRS:
        kept_score, at_score = place(table, text, inner * pairs, 5, tl.float32)
        kept_position, at_position = place(table, text, inner * pairs, 6, tl.int32)
        kept_score += at_score
        kept_position += at_position
    begins = split == 0
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
    if CODES:
        q_even, q_odd, q_factor, q_middle = halved_queries(
            q + batch * q_b + head * GROUP * q_h, q_h, GROUP, BG, D, BD)  # fmt: skip
        v_even, v_odd = row_of_levels(v, batch * v_b + head * v_h, WV, DV, BV, STEP_BYTES)
        even, odd = v_even[:, None] * denominator[None, :], v_odd[:, None] * denominator[None, :]
        middle = tl.zeros((BG,), tl.float32)
    else:
        acc = denominator[:, None] * (v_new.to(tl.float32) * tl.sum(v_factor, 0))
    if SINKS > 0:
        if begins:
            sink = tl.arange(0, BS)
            there = sink < tl.minimum(now, SINKS)
            sink_k, at_sink_k = place(table, text, inner * SINKS * WK, 7, KIND)
            sink_v, at_sink_v = place(table, text, inner * SINKS * WV, 8, KIND)
            if CODES:
                s_even, s_odd, s_factor, s_middle = q_even, q_odd, q_factor, q_middle
                if HAS_SINK_Q:
                    s_even, s_odd, s_factor, s_middle = halved_queries(
                        sink_q + (batch * KV_HEADS + head) * GROUP * D, D, GROUP, BG, D, BD)  # fmt: skip
                top, denominator, even, odd, middle = add_codes(
                    top, denominator, even, odd, middle, s_even, s_odd, s_factor, s_middle, sink_k, at_sink_k, sink_v,
                    at_sink_v, sink, there, there, scale, D, BD, DV, BV, WK, WV, STEP_BYTES, SOFTCAP,
                )  # fmt: skip
            else:
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
            if CODES:
                top, denominator, even, odd, middle = add_codes(
                    top, denominator, even, odd, middle, q_even, q_odd, q_factor, q_middle, kept_k, at_kept_k, kept_v,
                    at_kept_v, slot, inside, seen, scale, D, BD, DV, BV, WK, WV, STEP_BYTES, SOFTCAP,
                )  # fmt: skip
            else:
                top, denominator, acc = add_pairs(
                    top, denominator, acc, q_tile, kept_k, at_kept_k, kept_v, at_kept_v, slot, inside, seen, scale,
                    D, BD, DV, BV, BITS, WIDE, WK, WV, SOFTCAP, PRECISION,
                )  # fmt: skip
    ring_end = kept_tiles + (window + K - 1) // K
    for tile in tl.range(tl.maximum(first_tile, kept_tiles), tl.minimum(end_tile, ring_end), 1, num_stages=STAGES):
        slot = (tile - kept_tiles) * K + tl.arange(0, K)
        position, seen = ring_positions(now, slot, window)
        seen = seen & (position >= SINKS) & (slot != own)
        if HAS_PAIRS:
            leaving = (slot == own) & enters
            if HAS_REACH:
                leaving = leaving & (window < reach)
            seen = seen | leaving
        if CODES:
            top, denominator, even, odd, middle = add_codes(
                top, denominator, even, odd, middle, q_even, q_odd, q_factor, q_middle, ring_k, at_ring_k, ring_v,
                at_ring_v, slot, slot < window, seen, scale, D, BD, DV, BV, WK, WV, STEP_BYTES, SOFTCAP,
            )  # fmt: skip
        else:
            top, denominator, acc = add_pairs(
                top, denominator, acc, q_tile, ring_k, at_ring_k, ring_v, at_ring_v, slot, slot < window, seen, scale,
                D, BD, DV, BV, BITS, WIDE, WK, WV, SOFTCAP, PRECISION,
            )  # fmt: skip
    g = tl.arange(0, BG)
    row = ((batch * KV_HEADS + head) * splits + split) * GROUP + g
    tl.store(tops + row * 2, top, mask=g < GROUP)
    tl.store(tops + row * 2 + 1, denominator, mask=g < GROUP)
    if CODES:
        column = columns(BV)
        inside = (column < DV)[:, None] & (g < GROUP)[None, :]
        at = sums + row[None, :] * DV + column[:, None]
        tl.store(at, even - middle[None, :], mask=inside)
        tl.store(at + 1, odd - middle[None, :], mask=inside)
    else:
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
