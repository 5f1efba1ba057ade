"""Forward pass: the output of a block of C queries a program (tiles.py: blocks, tiles and reach; states.py: states).

Algorithm, for a block of head h:
1. softmax over the sinks and the key blocks of the window, one after the other, with a running row maximum, as in flash
   attention; numerator and denominator times the gate g;
2. plus phi(q) times the state, which holds all older keys;
3. plus, block by block, phi(q).phi(k) times values at the linear pairs in reach;
4. numerator / denominator is the output.
The maximum does not scale the linear half, so 1 must be finished before 2 and 3 go on with its accumulator.

What decides the sizes: 4 warps and at most 255 registers a thread without spills, so that two programs share a
multiprocessor and one computes while the other waits for its tiles.

Shapes: q, out [B, H, N, D or Dv]; k, v [B, KV, N, .]; maps [heads, D, width] or features [B, heads, N, F].
Bytes: q and out once per query head, k and v once per key head (the heads of a group share them in L2), one state per
group.
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
    LOG2E,
    add_softmax,
    cap,
    changing_one,
    load_bias,
    load_part,
    load_rows,
    load_sums,
    load_tile,
    load_vector,
    map_features,
    pair_masks,
    read_row,
    real_keys,
    store_tile,
    store_vector,
)


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q,
    k,
    v,
    map_q,
    map_k,
    bias_q,
    bias_k,
    factor,
    window_factor,
    sink_logits,
    decay,
    sink_k,
    sink_v,
    local,
    local_sum,
    local_decay,
    before,
    before_sum,
    rows,
    out,
    inverse,
    maximum,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    o_b,
    o_h,
    o_n,
    fq_b,
    fq_h,
    fk_b,
    fk_h,
    tokens,
    segments,
    groups,
    segment_tiles,
    scale,
    REACH: tl.constexpr,
    T: tl.constexpr,
    MIXED: tl.constexpr,
    KV_GROUP: tl.constexpr,
    STATE_GROUP: tl.constexpr,
    MAP_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WIDTH: tl.constexpr,
    F: tl.constexpr,
    BF: tl.constexpr,
    DV: tl.constexpr,
    BV: tl.constexpr,
    MAP: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACED: tl.constexpr,
    SINKS: tl.constexpr,
    BS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEARNED: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_STATES: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (HEADS, blocks, rows x value blocks)."""
    head = tl.program_id(0)
    block = tl.program_id(1)
    columns: tl.constexpr = (DV + BV - 1) // BV
    row = tl.program_id(2) // columns
    column0 = (tl.program_id(2) % columns) * BV
    batch, start, length, offset = read_row(rows, row, tokens, HAS_ROWS)
    first = block * C
    if first >= length:
        return
    dtype = out.dtype.element_ty
    state_dtype = tl.bfloat16 if dtype == tl.float16 else dtype
    group = first // T
    behind = block - group * (T // C)  # blocks of the tile before this one
    kv_head = head // KV_GROUP
    map_head = head // MAP_GROUP
    token0 = (batch * HEADS + head) * tokens + start
    out += batch * o_b + head * o_h + start * o_n
    decay += token0
    PARTS: tl.constexpr = 2 if MAP == HEDGEHOG else 1
    score_scale = scale if SOFTCAP > 0 else scale * LOG2E
    unit: tl.constexpr = LOG2E if SOFTCAP > 0 else 1.0

    # 1. softmax over sinks and window; scores times log2(e): powers of two are what the hardware has
    query = first + tl.arange(0, C)
    q_tile = load_rows(q, q_b, q_h, q_n, batch, head, start, first, length, 0, C, D, BD, TMA)
    top = tl.full((C,), -float("inf"), tl.float32)
    denominator = tl.zeros((C,), tl.float32)
    acc = tl.zeros((C, BV), tl.float32)
    if LEARNED:
        top = tl.zeros((C,), tl.float32) + tl.load(sink_logits + head).to(tl.float32) * LOG2E
        denominator += 1.0
    if SINKS > 0:
        sink = tl.arange(0, BS)
        sinks_at = (row * (HEADS // KV_GROUP) + kv_head).to(tl.int64)
        sk = load_tile(sink_k + sinks_at * SINKS * D, D, row * 0, SINKS, 0, BS, D, BD).to(dtype)
        sink_scores = cap(tl.dot(q_tile, tl.trans(sk), input_precision=PRECISION) * score_scale, SOFTCAP) * unit
        visible = (sink[None, :] <= query[:, None] + offset) & (sink < SINKS)[None, :]
        sink_scores = tl.where(visible, sink_scores, -float("inf"))
        sv = load_tile(sink_v + sinks_at * SINKS * DV, DV, row * 0, SINKS, column0, BS, DV, BV).to(dtype)
        top, denominator, acc = add_softmax(top, denominator, acc, sink_scores, sv, PRECISION)
    if WINDOW > 0:
        for c in tl.range(0, REACH + 1, num_stages=STAGES):
            key0 = first - c * C
            key = real_keys(key0 + tl.arange(0, C), offset, SINKS)
            near, far = pair_masks(query[:, None], key[None, :], offset, WINDOW, TERRACED)
            k_tile = load_rows(k, k_b, k_h, k_n, batch, kv_head, start, key0, length, 0, C, D, BD, TMA)
            s = cap(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * score_scale, SOFTCAP) * unit
            s = tl.where(near, s, -float("inf"))
            v_tile = load_rows(v, v_b, v_h, v_n, batch, kv_head, start, key0, length, column0, C, DV, BV, TMA)
            top, denominator, acc = add_softmax(top, denominator, acc, s, v_tile, PRECISION)
    top = tl.where(top == -float("inf"), 0.0, top)
    gate = tl.sigmoid(tl.load(window_factor + head).to(tl.float32))
    denominator *= gate
    acc *= gate

    # 2. features of the queries, and the state
    phi_scale = 1.0
    if HAS_FACTOR:
        phi_scale = tl.exp(tl.load(factor + head).to(tl.float32))
    if MAP != GIVEN:
        bq = load_bias(bias_q + head * WIDTH, WIDTH, BF, MAP)
        w = load_part(map_q, head, D, BD, WIDTH, 0, BF, TMA)
        phi_all = map_features(q_tile, w, bq, phi_scale, WIDTH, BF, MAP, PRECISION)
    else:
        q_phi = load_rows(map_q, fq_b, fq_h, F, batch, head, start, first, length, 0, C, F, BF, TMA)
        phi_all = (q_phi.to(tl.float32) * phi_scale,)
    phi = ()
    for i in tl.static_range(PARTS):
        phi = phi + (phi_all[i].to(dtype),)
    if HAS_DECAY:
        passed = tl.cumsum(load_vector(decay, first, length, C), 0)  # from the start of the reach
        for t in range(1, REACH + behind + 1):
            passed += tl.sum(load_vector(decay, first - t * C, length, C), 0)
    if HAS_STATES:
        row_head = (row * (HEADS // STATE_GROUP) + head // STATE_GROUP).to(tl.int64)
        at = row_head * groups + group
        at_before = row_head * segments + group // segment_tiles
        fade = 1.0
        if HAS_DECAY and SPLIT:
            fade = tl.exp(tl.load(local_decay + at))
        # With more than one stage a loop, so that the tiles of both parts are on their way at once.
        UNROLLED: tl.constexpr = PARTS if STAGES == 1 else 1
        for step in tl.range(0, PARTS // UNROLLED, num_stages=STAGES):
            for i in tl.static_range(UNROLLED):
                part = step * UNROLLED + i
                k_sum = load_sums(
                    local_sum + at * F, before_sum + at_before * F * (DV + 1) + F * DV, fade, part, SPLIT, WIDTH, BF
                )
                phi_i = phi[i]
                if UNROLLED < PARTS:
                    phi_i = tl.where(step == 0, phi[0], phi[1])
                if HAS_DECAY:
                    phi_i = (phi_i * tl.exp(passed)[:, None]).to(dtype)
                denominator += tl.sum(phi_i.to(tl.float32) * k_sum[None, :], 1)
                # Two products rather than one sum: the sum would go through registers.
                kv = load_part(local, at * PARTS + part, WIDTH, BF, DV, column0, BV, TMA)
                acc = tl.dot(phi_i.to(state_dtype), kv, acc, input_precision=PRECISION)
                if SPLIT:
                    if HAS_DECAY:
                        phi_i = (phi_i * fade).to(dtype)
                    kv = load_part(before, at_before * PARTS + part, WIDTH, BF, DV, column0, BV, TMA)
                    acc = tl.dot(phi_i.to(state_dtype), kv, acc, input_precision=PRECISION)

    # 3. linear pairs in reach
    if MAP != GIVEN:
        wk = load_part(map_k, map_head, D, BD, WIDTH, 0, BF, TMA)
        bk = load_bias(bias_k + map_head * WIDTH, WIDTH, BF, MAP)
    for c in tl.range(-REACH - behind, MIXED, num_stages=STAGES):
        one = changing_one(window_factor + head, dtype)
        key0 = first + c * C
        key = real_keys(key0 + tl.arange(0, C), offset, SINKS)
        near, far = pair_masks(query[:, None], key[None, :], offset, WINDOW, TERRACED)
        if MAP != GIVEN:
            k_tile = load_rows(k, k_b, k_h, k_n, batch, kv_head, start, key0, length, 0, C, D, BD, TMA)
            phi_k = map_features(k_tile, wk, bk, 1.0, WIDTH, BF, MAP, PRECISION)
        else:
            k_phi = load_rows(map_k, fk_b, fk_h, F, batch, map_head, start, key0, length, 0, C, F, BF, TMA)
            phi_k = (k_phi.to(tl.float32),)
        pairs = tl.zeros((C, C), tl.float32)
        for i in tl.static_range(PARTS):
            pairs = tl.dot(phi[i] * one, tl.trans(phi_k[i].to(dtype)), pairs, input_precision=PRECISION)
        if HAS_DECAY:
            losses = load_vector(decay, key0, length, C)
            pairs *= tl.exp(tl.where(far, passed[:, None] - tl.cumsum(losses, 0)[None, :], 0.0))
            passed -= tl.sum(losses, 0)
        pairs = tl.where(far, pairs, 0.0)
        denominator += tl.sum(pairs, 1)
        v_tile = load_rows(v, v_b, v_h, v_n, batch, kv_head, start, key0, length, column0, C, DV, BV, TMA)
        acc = tl.dot(pairs.to(dtype), v_tile, acc, input_precision=PRECISION)

    # 4. the output
    r = tl.where(denominator != 0, 1.0 / tl.where(denominator != 0, denominator, 1.0), 0.0)
    store_tile(out, o_n, first, length, column0, acc * r[:, None], C, DV, BV)
    if SAVE:
        if column0 == 0:
            store_vector(inverse + token0, first, length, r, C)
            store_vector(maximum + token0, first, length, top, C)
