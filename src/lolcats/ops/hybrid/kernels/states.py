"""The states: sums of phi(x) value^T over all that is out of reach of each tile.

Algorithm: the text of each head is cut into segments of SEGMENT tiles. `sum_segments` walks each segment, all of them
in parallel, and writes what it has summed before each tile (`local`) and in the end (`sums`); `scan_segments` turns the
sums into what comes before (after, for the backward pass) each segment. Readers add the two (`load_state`).

Forward: x = k, value = v; tile u of queries receives the keys up to REACH blocks before it. Backward: x = q, value =
do / denominator; tile u of keys receives the queries from REACH blocks after it on, and in the place of the sum of
phi(k) is the sum of phi(q) (-do.o / denominator).

Shapes: local [R, heads, tiles, F, Dv] in the type of the products' operands and local_sum [R, heads, tiles, F] fp32;
sums [R, heads, segments, F Dv + F] fp32, the same after the scan with kv once more in the operands' type.
Bytes: x and value once a head; local once written and, by the readers, once read: 2 F Dv / T a token and head.
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
    load_bias,
    load_matrix,
    load_tile,
    load_vector,
    map_features,
    read_row,
    store_matrix,
)


@triton.jit
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
    SEGMENT: tl.constexpr,
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
    C: tl.constexpr,
    T: tl.constexpr,
):
    """Grid: (HEADS, segments, rows x value blocks)."""
    head = tl.program_id(0)
    segment = tl.program_id(1)
    columns: tl.constexpr = (DV + BV - 1) // BV
    row = tl.program_id(2) // columns
    column0 = (tl.program_id(2) % columns) * BV
    batch, start, length, offset = read_row(rows, row, tokens, HAS_ROWS)
    x += batch * x_b + (head // X_GROUP) * x_h + start * x_n
    values += batch * v_b + (head // V_GROUP) * v_h + start * v_n
    token0 = (batch * HEADS + head) * tokens + start
    inverse += token0
    delta += token0
    decay += token0
    row_head = (row * HEADS + head).to(tl.int64)
    local += row_head * tiles * F * DV
    local_sum += row_head * tiles * F
    local_decay += row_head * tiles
    sums += (row_head * segments + segment) * F * (DV + 1)
    dtype = values.dtype.element_ty
    if MAP != GIVEN:
        w = load_matrix(weight + head * D * WIDTH, D, BD, WIDTH, WIDTH, 0, BF).to(dtype)
        b = load_bias(bias + head * WIDTH, WIDTH, BF, MAP)
    else:
        w = 0.0
        b = 0.0
    scale = 1.0
    if HAS_FACTOR:
        scale = tl.exp(tl.load(factor + head).to(tl.float32))
    f = tl.arange(0, BF)

    kv = tl.zeros((BF, BV), tl.float32)
    k_sum = tl.zeros((BF,), tl.float32)
    kv_back = tl.zeros((BF, BV), tl.float32)
    k_sum_back = tl.zeros((BF,), tl.float32)
    log_decay = 0.0
    for step in range(SEGMENT):
        place = segment * SEGMENT + (SEGMENT - 1 - step if REVERSE else step)
        to = local + tl.cast(place, tl.int64) * F * DV
        if place < tiles:
            store_matrix(to, kv, WIDTH, BF, DV, DV, column0, BV)
            if MAP == HEDGEHOG:
                store_matrix(to + WIDTH * DV, kv_back, WIDTH, BF, DV, DV, column0, BV)
            if column0 == 0:
                tl.store(local_sum + place * F + f, k_sum, mask=f < WIDTH)
                if MAP == HEDGEHOG:
                    tl.store(local_sum + place * F + WIDTH + f, k_sum_back, mask=f < WIDTH)
                if HAS_DECAY:
                    tl.store(local_decay + place, log_decay)
        # a tile, moved by the reach
        first = place * T + REACH * C if REVERSE else place * T - REACH * C
        token = first + tl.arange(0, T)
        if MAP != GIVEN:
            tile = load_tile(x, x_n, first, length, 0, T, D, BD)
        else:
            tile = load_tile(x, x_n, first, length, 0, T, F, BF)
        v = load_tile(values, v_n, first, length, column0, T, DV, BV)
        phi = map_features(tile, w, b, scale, WIDTH, BF, MAP, PRECISION)
        inside = (token >= 0) & (token < length)
        if REVERSE:
            r = load_vector(inverse, first, length, T)
            value_weight = tl.where(inside, r, 0.0)
            sum_weight = -value_weight * load_vector(delta, first, length, T)
        else:
            if SINKS > 0:
                inside = inside & (token + offset >= SINKS)
            if HAS_KEEP:
                inside = inside & (load_vector(keep + batch * tokens + start, first, length, T) != 0)
            value_weight = tl.where(inside, 1.0, 0.0)
            sum_weight = value_weight
        if HAS_DECAY:
            losses = load_vector(decay, first, length, T)
            passed = tl.cumsum(losses, 0)
            if REVERSE:  # from the start of the key tile to the query
                own = load_vector(decay, place * T, length, T)
                for t in tl.static_range((REACH * C + T - 1) // T):
                    between = load_vector(decay, place * T + t * T, length, T)
                    passed += tl.sum(tl.where(tl.arange(0, T) + t * T < REACH * C, between, 0.0), 0)
                total = tl.sum(own, 0)
            else:
                total = tl.sum(losses, 0)
                passed = total - passed
            value_weight *= tl.exp(passed)
            sum_weight *= tl.exp(passed)
            fade = tl.exp(total)
            kv *= fade
            k_sum *= fade
            kv_back *= fade
            k_sum_back *= fade
            log_decay += total
        k_sum += tl.sum(phi[0] * sum_weight[:, None], 0)
        kv = tl.dot(tl.trans((phi[0] * value_weight[:, None]).to(dtype)), v, kv, input_precision=PRECISION)
        if MAP == HEDGEHOG:
            k_sum_back += tl.sum(phi[1] * sum_weight[:, None], 0)
            weighted = tl.trans((phi[1] * value_weight[:, None]).to(dtype))
            kv_back = tl.dot(weighted, v, kv_back, input_precision=PRECISION)

    store_matrix(sums, kv, WIDTH, BF, DV, DV, column0, BV)
    if MAP == HEDGEHOG:
        store_matrix(sums + WIDTH * DV, kv_back, WIDTH, BF, DV, DV, column0, BV)
    if column0 == 0:
        tl.store(sums + F * DV + f, k_sum, mask=f < WIDTH)
        if MAP == HEDGEHOG:
            tl.store(sums + F * DV + WIDTH + f, k_sum_back, mask=f < WIDTH)
        if HAS_DECAY:
            tl.store(decays + row_head * segments + segment, log_decay)


@triton.jit
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
