"""Forward pass: the output of one tile of T queries a program (T is 128, less where sizes are large: launch.py).

Algorithm, for a tile of head h (see states.py for the states and tiles.py for blocks and reach):
1. scores against the keys from REACH blocks before the tile to its end, and the sinks: their row maximum m;
2. phi(q) times the state, which holds all older keys;
3. block by block, weights times values: g exp(score - m) at softmax pairs (the scores are made again: keeping them
   would take the registers of the accumulator), phi(q).phi(k) at linear pairs;
4. numerator / denominator is the output.

Shapes: q, out [B, H, N, D or Dv]; k, v [B, KV, N, .]; maps [heads, D, width] or features [B, heads, N, F].
Bytes: q and out once a query head, k and v once a key head (the heads of a group share them in L2), a state a group.
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
    LOG2E,
    cap,
    load_bias,
    load_matrix,
    load_state,
    load_tile,
    load_vector,
    map_features,
    pair_masks,
    read_row,
    real_keys,
    store_tile,
    store_vector,
)


@triton.jit
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
    tokens,
    segments,
    groups,
    scale,
    SEGMENT: tl.constexpr,
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
    C: tl.constexpr,
):
    """Grid: (HEADS, groups, rows x value blocks)."""
    head = tl.program_id(0)
    group = tl.program_id(1)
    columns: tl.constexpr = (DV + BV - 1) // BV
    row = tl.program_id(2) // columns
    column0 = (tl.program_id(2) % columns) * BV
    batch, start, length, offset = read_row(rows, row, tokens, HAS_ROWS)
    first = group * T
    if first >= length:
        return
    dtype = v.dtype.element_ty
    state_dtype = tl.bfloat16 if dtype == tl.float16 else dtype
    kv_head = head // KV_GROUP
    token0 = (batch * HEADS + head) * tokens + start
    q += batch * q_b + head * q_h + start * q_n
    k += batch * k_b + kv_head * k_h + start * k_n
    v += batch * v_b + kv_head * v_h + start * v_n
    out += batch * o_b + head * o_h + start * o_n
    decay += token0
    if MAP != GIVEN:
        map_q += head * D * WIDTH
        map_k += (head // MAP_GROUP) * D * WIDTH
        bias_q = load_bias(bias_q + head * WIDTH, WIDTH, BF, MAP)
        bias_k = load_bias(bias_k + (head // MAP_GROUP) * WIDTH, WIDTH, BF, MAP)
    else:
        map_q += token0 * F
        map_k += ((batch * (HEADS // MAP_GROUP) + head // MAP_GROUP) * tokens + start) * F
    PARTS: tl.constexpr = 2 if MAP == HEDGEHOG else 1

    # 1. the row maximum over all softmax pairs
    query = first + tl.arange(0, T)
    q_tile = load_tile(q, q_n, first, length, 0, T, D, BD)
    top = tl.full((T,), -float("inf"), tl.float32)
    if WINDOW > 0:
        for c in range(-REACH, 2):
            key = real_keys(first + c * C + tl.arange(0, C), offset, SINKS)
            near, far = pair_masks(query[:, None], key[None, :], offset, WINDOW, TERRACED)
            k_tile = load_tile(k, k_n, first + c * C, length, 0, C, D, BD)
            s = cap(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale, SOFTCAP) * LOG2E
            top = tl.maximum(top, tl.max(tl.where(near, s, -float("inf")), 1))
    if SINKS > 0:
        sink = tl.arange(0, BS)
        sinks_at = (row * (HEADS // KV_GROUP) + kv_head).to(tl.int64)
        sk = load_tile(sink_k + sinks_at * SINKS * D, D, row * 0, SINKS, 0, BS, D, BD).to(dtype)
        sink_scores = cap(tl.dot(q_tile, tl.trans(sk), input_precision=PRECISION) * scale, SOFTCAP) * LOG2E
        visible = (sink[None, :] <= query[:, None] + offset) & (sink < SINKS)[None, :]
        sink_scores = tl.where(visible, sink_scores, -float("inf"))
        top = tl.maximum(top, tl.max(sink_scores, 1))
    if LEARNED:
        learned = tl.load(sink_logits + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, learned)
    top = tl.where(top == -float("inf"), 0.0, top)  # of scores log2(e): powers of two are what the hardware has

    base = top - tl.log2(tl.sigmoid(tl.load(window_factor + head).to(tl.float32)))

    # 2. features of the queries, and the state
    phi_scale = 1.0
    if HAS_FACTOR:
        phi_scale = tl.exp(tl.load(factor + head).to(tl.float32))
    if MAP != GIVEN:
        w = load_matrix(map_q, D, BD, WIDTH, WIDTH, 0, BF).to(dtype)
        phi_all = map_features(q_tile, w, bias_q, phi_scale, WIDTH, BF, MAP, PRECISION)
    else:
        phi_all = (load_tile(map_q, F, first, length, 0, T, F, BF).to(tl.float32) * phi_scale,)
    phi = ()
    for i in tl.static_range(PARTS):
        phi = phi + (phi_all[i].to(dtype),)
    denominator = tl.zeros((T,), tl.float32)
    acc = tl.zeros((T, BV), tl.float32)
    if HAS_DECAY:
        passed = tl.cumsum(load_vector(decay, first, length, T), 0)  # from the start of the reach
        for t in tl.static_range(1, REACH + 1):
            passed += tl.sum(load_vector(decay, first - t * C, length, C), 0)
    if HAS_STATES:
        row_head = (row * (HEADS // STATE_GROUP) + head // STATE_GROUP).to(tl.int64)
        at = row_head * groups + group
        at_before = row_head * segments + group // SEGMENT
        fade = 1.0
        if HAS_DECAY and SPLIT:
            fade = tl.exp(tl.load(local_decay + at))
        for i in tl.static_range(PARTS):
            kv, k_sum = load_state(
                local + at * F * DV, local_sum + at * F, before + at_before * F * DV,
                before_sum + at_before * F * (DV + 1) + F * DV, fade, i, SPLIT, WIDTH, BF, DV, column0, BV,
            )  # fmt: skip
            phi_i = phi[i]
            if HAS_DECAY:
                phi_i = (phi_i * tl.exp(passed)[:, None]).to(dtype)
            denominator += tl.sum(phi_i.to(tl.float32) * k_sum[None, :], 1)
            acc = tl.dot(phi_i.to(state_dtype), kv, acc, input_precision=PRECISION)

    # 3. blocks of keys with linear pairs (and softmax pairs), then those with softmax pairs alone
    if MAP != GIVEN:
        wk = load_matrix(map_k, D, BD, WIDTH, WIDTH, 0, BF).to(dtype)
    else:
        wk = 0.0
    for c in range(-REACH, MIXED):
        key = real_keys(first + c * C + tl.arange(0, C), offset, SINKS)
        near, far = pair_masks(query[:, None], key[None, :], offset, WINDOW, TERRACED)
        if (MAP != GIVEN) or (WINDOW > 0):
            k_tile = load_tile(k, k_n, first + c * C, length, 0, C, D, BD)
        if MAP != GIVEN:
            phi_k = map_features(k_tile, wk, bias_k, 1.0, WIDTH, BF, MAP, PRECISION)
        else:
            phi_k = (load_tile(map_k, F, first + c * C, length, 0, C, F, BF).to(tl.float32),)
        pairs = tl.zeros((T, C), tl.float32)
        for i in tl.static_range(PARTS):
            pairs = tl.dot(phi[i], tl.trans(phi_k[i].to(dtype)), pairs, input_precision=PRECISION)
        if HAS_DECAY:
            losses = load_vector(decay, first + c * C, length, C)
            pairs *= tl.exp(tl.where(far, passed[:, None] - tl.cumsum(losses, 0)[None, :], 0.0))
            passed -= tl.sum(losses, 0)
        weights = tl.where(far, pairs, 0.0)
        if WINDOW > 0:
            s = cap(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale, SOFTCAP) * LOG2E
            weights = tl.where(near, tl.exp2(s - base[:, None]), weights)
        denominator += tl.sum(weights, 1)
        v_tile = load_tile(v, v_n, first + c * C, length, column0, C, DV, BV)
        acc = tl.dot(weights.to(dtype), v_tile, acc, input_precision=PRECISION)
    for c in range(MIXED, 2):
        key = real_keys(first + c * C + tl.arange(0, C), offset, SINKS)
        near, far = pair_masks(query[:, None], key[None, :], offset, WINDOW, TERRACED)
        k_tile = load_tile(k, k_n, first + c * C, length, 0, C, D, BD)
        v_tile = load_tile(v, v_n, first + c * C, length, column0, C, DV, BV)
        s = cap(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale, SOFTCAP) * LOG2E
        weights = tl.exp2(tl.where(near, s - base[:, None], -float("inf")))
        denominator += tl.sum(weights, 1)
        acc = tl.dot(weights.to(dtype), v_tile, acc, input_precision=PRECISION)
    if SINKS > 0:
        w = tl.exp2(sink_scores - base[:, None])
        denominator += tl.sum(w, 1)
        sv = load_tile(sink_v + sinks_at * SINKS * DV, DV, row * 0, SINKS, column0, BS, DV, BV).to(dtype)
        acc = tl.dot(w.to(dtype), sv, acc, input_precision=PRECISION)
    if LEARNED:
        denominator += tl.exp2(learned - base)

    # 4. the output
    r = tl.where(denominator != 0, 1.0 / tl.where(denominator != 0, denominator, 1.0), 0.0)
    store_tile(out, o_n, first, length, column0, acc * r[:, None], T, DV, BV)
    if SAVE:
        if column0 == 0:
            store_vector(inverse + token0, first, length, r, T)
            store_vector(maximum + token0, first, length, top, T)
