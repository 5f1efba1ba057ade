"""The states: sums of phi(x) value^T over all that is out of reach of each tile.

Algorithm: the text of each head is cut into segments of so many tiles. `sum_segments` walks each segment block by
block, all of them in parallel and the two halves of a hedgehog map apart, and writes what it has summed before each
tile (`local`) and in the end (`sums`); `scan_segments` turns the sums into what comes before (after, for the backward
pass) each segment. Readers add the two.

Forward: x = k, value = v; tile u of queries receives the keys up to REACH blocks before it. Backward: x = q, value =
do / denominator; tile u of keys receives the queries from REACH blocks after it on, and in the place of the sum of
phi(k) is the sum of phi(q) (-do.o / denominator).

Shapes: local [R, heads, tiles, parts, width, Dv] in the type of the products' operands and local_sum [R, heads, tiles,
F] fp32; sums [R, heads, segments, F Dv + F] fp32, the same after the scan with kv once more in the operands' type.
Bytes: x and value once a part and head; local once written and, by each block, once read: 6 F Dv / T a token and head.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

import triton
import triton.language as tl

from lolcats.ops.hybrid.kernels.tiles import (
    GIVEN,
    HEDGEHOG,
    LENGTHS,
    load_bias,
    load_part,
    load_rows,
    load_vector,
    map_part,
    read_row,
    store_matrix,
    store_part,
)


@triton.jit(do_not_specialize=LENGTHS)
def sum_segments(
    x,
    values,
    weight,
    bias,
    factor,
    inverse,
    delta,
    decay,
    keep,
    rows,
    local,
    local_sum,
    local_decay,
    sums,
    decays,
    x_b,
    x_h,
    x_n,
    v_b,
    v_h,
    v_n,
    tokens,
    segments,
    tiles,
    segment_tiles,
    REACH: tl.constexpr,
    REVERSE: tl.constexpr,
    X_GROUP: tl.constexpr,
    V_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WIDTH: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    DV: tl.constexpr,
    BV: tl.constexpr,
    MAP: tl.constexpr,
    SINKS: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
):
    """Grid: (HEADS x parts, segments, rows x value blocks)."""
    PARTS: tl.constexpr = 2 if MAP == HEDGEHOG else 1
    head = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    segment = tl.program_id(1)
    columns: tl.constexpr = (DV + BV - 1) // BV
    row = tl.program_id(2) // columns
    column0 = (tl.program_id(2) % columns) * BV
    batch, start, length, offset = read_row(rows, row, tokens, HAS_ROWS)
    token0 = (batch * HEADS + head) * tokens + start
    inverse += token0
    delta += token0
    decay += token0
    row_head = (row * HEADS + head).to(tl.int64)
    local_sum += row_head * tiles * F + part * WIDTH
    local_decay += row_head * tiles
    sums += (row_head * segments + segment) * F * (DV + 1)
    dtype = values.dtype.element_ty if not TMA else values.dtype
    if MAP != GIVEN:
        w = load_part(weight, head, D, BD, WIDTH, 0, BF, TMA)
        b = load_bias(bias + head * WIDTH, WIDTH, BF, MAP)
    else:
        w = 0.0
        b = 0.0
    scale = 1.0
    if HAS_FACTOR:
        scale = tl.exp(tl.load(factor + head).to(tl.float32))
    sign = tl.where(part == 0, 1.0, -1.0)
    f = tl.arange(0, BF)

    kv = tl.zeros((BF, BV), tl.float32)
    weighted_sum = tl.zeros((C, BF), tl.float32)  # over rows: k_sum; added up where it is stored
    log_decay = 0.0
    BLOCKS: tl.constexpr = T // C
    for step in range(segment_tiles * BLOCKS):
        place = segment * segment_tiles * BLOCKS + (segment_tiles * BLOCKS - 1 - step if REVERSE else step)
        tile_at = place // BLOCKS
        if step % BLOCKS == 0:
            if tile_at < tiles:
                index = (row_head * tiles + tile_at) * PARTS + part
                store_part(local, index, kv, WIDTH, BF, DV, column0, BV, TMA)
                if column0 == 0:
                    tl.store(local_sum + tile_at * F + f, tl.sum(weighted_sum, 0), mask=f < WIDTH)
                    if HAS_DECAY:
                        tl.store(local_decay + tile_at, log_decay)
        # a block, moved by the reach
        first = place * C + REACH * C if REVERSE else place * C - REACH * C
        token = first + tl.arange(0, C)
        if MAP != GIVEN:
            tile = load_rows(x, x_b, x_h, x_n, batch, head // X_GROUP, start, first, length, 0, C, D, BD, TMA)
        else:
            tile = load_rows(x, x_b, x_h, x_n, batch, head // X_GROUP, start, first, length, 0, C, F, BF, TMA)
        v = load_rows(values, v_b, v_h, v_n, batch, head // V_GROUP, start, first, length, column0, C, DV, BV, TMA)
        phi = map_part(tile, w, b, scale, sign, WIDTH, BF, MAP, PRECISION)
        inside = (token >= 0) & (token < length)
        if REVERSE:
            r = load_vector(inverse, first, length, C)
            value_weight = tl.where(inside, r, 0.0)
            sum_weight = -value_weight * load_vector(delta, first, length, C)
        else:
            if SINKS > 0:
                inside = inside & (token + offset >= SINKS)
            if HAS_KEEP:
                inside = inside & (load_vector(keep + batch * tokens + start, first, length, C) != 0)
            value_weight = tl.where(inside, 1.0, 0.0)
            sum_weight = value_weight
        if HAS_DECAY:
            losses = load_vector(decay, first, length, C)
            passed = tl.cumsum(losses, 0)
            if REVERSE:  # from the start of the key block to the query
                own = load_vector(decay, place * C, length, C)
                for t in tl.static_range(REACH):
                    passed += tl.sum(load_vector(decay, (place + t) * C, length, C), 0)
                total = tl.sum(own, 0)
            else:
                total = tl.sum(losses, 0)
                passed = total - passed
            value_weight *= tl.exp(passed)
            sum_weight *= tl.exp(passed)
            fade = tl.exp(total)
            kv *= fade
            weighted_sum *= fade
            log_decay += total
        weighted_sum += phi * sum_weight[:, None]
        kv = tl.dot(tl.trans((phi * value_weight[:, None]).to(dtype)), v, kv, input_precision=PRECISION)

    at = sums + part * WIDTH * DV
    store_matrix(at, kv, WIDTH, BF, DV, DV, column0, BV)
    if column0 == 0:
        tl.store(sums + F * DV + part * WIDTH + f, tl.sum(weighted_sum, 0), mask=f < WIDTH)
        if HAS_DECAY:
            tl.store(decays + row_head * segments + segment, log_decay)


@triton.jit(do_not_specialize=LENGTHS)
def scan_segments(
    sums,
    before,
    decays,
    initial,
    final,
    segments,
    numbers,
    kv_numbers,
    REVERSE: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (rows x heads, blocks of numbers). In place: sum of segment s -> sum over those before (after) it."""
    head = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numbers
    carry = tl.zeros((BLOCK,), tl.float32)
    if HAS_INITIAL:
        carry = tl.load(initial + head * numbers + index, mask=inside, other=0.0)
    for step in range(segments):
        segment = segments - 1 - step if REVERSE else step
        place = (head * segments + segment) * numbers + index
        x = tl.load(sums + place, mask=inside, other=0.0)
        tl.store(before + (head * segments + segment) * kv_numbers + index, carry.to(before.dtype.element_ty),
                 mask=index < kv_numbers)  # fmt: skip
        tl.store(sums + place, carry, mask=inside & (index >= kv_numbers))
        if HAS_DECAY:
            carry *= tl.exp(tl.load(decays + head * segments + segment))
        carry += x
    if HAS_FINAL:
        tl.store(final + head * numbers + index, carry, mask=inside)
