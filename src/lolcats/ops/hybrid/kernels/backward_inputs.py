"""Backward pass to the inputs: dq, dk and dv, of the window and the sinks and through the feature maps.

The softmax half is that of a sliding-window attention with two changes. The row maximum m_i is part of the function
(the linear weights are not rescaled by it), so its gradient flows to the score it was taken from: ds_ij = w_ij dw_ij +
[j is the place of the maximum] a_i, with a_i of backward_features.py (of tied keys one takes it all). And the
denominator d_i also holds the linear half: w_ij = g exp(s_ij - m_i), dw_ij = (do_i.v_j - do_i.o_i) / d_i.

What comes through the maps is dy W^T, with dy of backward_features.py, which has also written the linear half of dv.
The sinks' dk and dv are sums over all queries: the query side writes a partial sum a tile.
Bytes: q, do, dq and dy once per query head; k, v, dk, dv once per key head.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

import triton
import triton.language as tl

from lolcats.ops.hybrid.kernels.tiles import (
    COUNTS,
    GIVEN,
    LOG2E,
    cap,
    load_part,
    load_rows,
    load_tile,
    load_vector,
    pair_masks,
    read_row,
    real_keys,
    store_tile,
    store_vector,
    times_slope,
)

NOWHERE: tl.constexpr = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=COUNTS)
def query_inputs(
    q,
    k,
    v,
    map_q,
    window_factor,
    sink_logits,
    sink_k,
    sink_v,
    rows,
    grad,
    inverse,
    delta,
    linear_part,
    dy,
    dq,
    place,
    sink_dk,
    sink_dv,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    g_b,
    g_h,
    g_n,
    dq_b,
    dq_h,
    dq_n,
    tokens,
    tiles,
    scale,
    REACH: tl.constexpr,
    KV_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WIDTH: tl.constexpr,
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
    HAS_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    C: tl.constexpr,
):
    """Grid: (HEADS, blocks, rows)."""
    head = tl.program_id(0)
    tile = tl.program_id(1)
    row = tl.program_id(2)
    batch, start, length, offset = read_row(rows, row, tokens, HAS_ROWS)
    first = tile * C
    if first >= length:
        return
    dtype = grad.dtype if TMA else grad.dtype.element_ty
    kv_head = head // KV_GROUP
    token0 = (batch * HEADS + head) * tokens + start
    query = first + tl.arange(0, C)
    q_tile = load_rows(q, q_b, q_h, q_n, batch, head, start, first, length, 0, C, D, BD, TMA)
    # The maximum and its place are found anew: scores are equal to the last bit only within one kernel.
    top = tl.full((C,), -float("inf"), tl.float32)
    best = tl.full((C,), NOWHERE, tl.int32)
    if WINDOW > 0:
        for c in range(-REACH, 1):
            key0 = first + c * C
            key = real_keys(key0 + tl.arange(0, C), offset, SINKS)
            near, far = pair_masks(query[:, None], key[None, :], offset, WINDOW, TERRACED)
            k_tile = load_rows(k, k_b, k_h, k_n, batch, kv_head, start, key0, length, 0, C, D, BD, TMA)
            s = cap(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale, SOFTCAP) * LOG2E
            s = tl.where(near, s, -float("inf"))
            here = tl.max(s, 1)
            at_top = tl.min(tl.where(near & (s == here[:, None]), key[None, :], NOWHERE), 1)
            best = tl.where((here > top) & (at_top != NOWHERE), at_top, best)
            top = tl.maximum(top, here)
    if SINKS > 0:
        sink = tl.arange(0, BS)
        sinks_at = (row * (HEADS // KV_GROUP) + kv_head).to(tl.int64)
        sk = load_tile(sink_k + sinks_at * SINKS * D, D, row * 0, SINKS, 0, BS, D, BD).to(dtype)
        sink_scores = cap(tl.dot(q_tile, tl.trans(sk), input_precision=PRECISION) * scale, SOFTCAP) * LOG2E
        visible = (sink[None, :] <= query[:, None] + offset) & (sink < SINKS)[None, :]
        sink_scores = tl.where(visible, sink_scores, -float("inf"))
        here = tl.max(sink_scores, 1)
        at_top = tl.min(tl.where(visible & (sink_scores == here[:, None]), sink[None, :], NOWHERE), 1)
        best = tl.where((here >= top) & (at_top != NOWHERE), -1 - at_top, best)  # sinks are -1, -2, ...
        top = tl.maximum(top, here)
    if LEARNED:
        learned = tl.load(sink_logits + head).to(tl.float32) * LOG2E
        best = tl.where(learned > top, NOWHERE, best)
        top = tl.maximum(top, learned)
    top = tl.where(top == -float("inf"), 0.0, top)
    store_vector(place + token0, first, length, best, C)

    base = top - tl.log2(tl.sigmoid(tl.load(window_factor + head).to(tl.float32)))
    g_tile = load_rows(grad, g_b, g_h, g_n, batch, head, start, first, length, 0, C, DV, BV, TMA)
    r = load_vector(inverse + token0, first, length, C)
    product = load_vector(delta + token0, first, length, C)
    a = load_vector(linear_part + token0, first, length, C)
    acc = tl.zeros((C, BD), tl.float32)
    if MAP != GIVEN:
        dx = load_tile(dy + token0 * WIDTH, WIDTH, first, length, 0, C, WIDTH, BF)
        wq = load_part(map_q, head, D, BD, WIDTH, 0, BF, TMA)
        acc = tl.dot(dx, tl.trans(wq), acc, input_precision=PRECISION)
    if WINDOW > 0:
        for c in range(-REACH, 1):
            key0 = first + c * C
            key = real_keys(key0 + tl.arange(0, C), offset, SINKS)
            near, far = pair_masks(query[:, None], key[None, :], offset, WINDOW, TERRACED)
            k_tile = load_rows(k, k_b, k_h, k_n, batch, kv_head, start, key0, length, 0, C, D, BD, TMA)
            v_tile = load_rows(v, v_b, v_h, v_n, batch, kv_head, start, key0, length, 0, C, DV, BV, TMA)
            s = cap(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale, SOFTCAP)
            w = tl.exp2(tl.where(near, s * LOG2E - base[:, None], -float("inf")))
            dw = (tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION) - product[:, None]) * r[:, None]
            ds = w * dw + tl.where(best[:, None] == key[None, :], a[:, None], 0.0)
            ds = times_slope(ds, s, SOFTCAP) * scale
            acc = tl.dot(ds.to(dtype), k_tile, acc, input_precision=PRECISION)
    if SINKS > 0:
        sv = load_tile(sink_v + sinks_at * SINKS * DV, DV, row * 0, SINKS, 0, BS, DV, BV).to(dtype)
        w = tl.exp2(sink_scores - base[:, None])
        dw = (tl.dot(g_tile, tl.trans(sv), input_precision=PRECISION) - product[:, None]) * r[:, None]
        ds = w * dw + tl.where(best[:, None] == -1 - sink[None, :], a[:, None], 0.0)
        ds = times_slope(ds, tl.where(visible, sink_scores * (1.0 / LOG2E), 0.0), SOFTCAP)
        ds = tl.where(visible, ds * scale, 0.0).to(dtype)
        acc = tl.dot(ds, sk, acc, input_precision=PRECISION)
        w = tl.where(visible & (query < length)[:, None], w * r[:, None], 0.0).to(dtype)
        at = ((row * HEADS + head) * tiles + tile).to(tl.int64) * SINKS
        to_k = tl.dot(tl.trans(ds), q_tile, input_precision=PRECISION)
        to_v = tl.dot(tl.trans(w), g_tile, input_precision=PRECISION)
        store_tile(sink_dk + at * D, D, row * 0, SINKS, 0, to_k, BS, D, BD)
        store_tile(sink_dv + at * DV, DV, row * 0, SINKS, 0, to_v, BS, DV, BV)
    store_tile(dq + batch * dq_b + head * dq_h + start * dq_n, dq_n, first, length, 0, acc, C, D, BD)


@triton.jit(do_not_specialize=COUNTS)
def key_inputs(
    q,
    k,
    v,
    map_k,
    window_factor,
    rows,
    grad,
    inverse,
    delta,
    maximum,
    linear_part,
    place,
    sink_dk,
    sink_dv,
    dy,
    dk,
    dv,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    g_b,
    g_h,
    g_n,
    tokens,
    scale,
    REACH: tl.constexpr,
    KV_GROUP: tl.constexpr,
    MAP_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WIDTH: tl.constexpr,
    BF: tl.constexpr,
    DV: tl.constexpr,
    BV: tl.constexpr,
    MAP: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACED: tl.constexpr,
    SINKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    C: tl.constexpr,
):
    """Grid: (key heads, blocks, rows)."""
    kv_head = tl.program_id(0)
    row = tl.program_id(2)
    batch, start, length, offset = read_row(rows, row, tokens, HAS_ROWS)
    first = tl.program_id(1) * C
    if first >= length:
        return
    dtype = grad.dtype if TMA else grad.dtype.element_ty
    key = real_keys(first + tl.arange(0, C), offset, SINKS)
    k_tile = load_rows(k, k_b, k_h, k_n, batch, kv_head, start, first, length, 0, C, D, BD, TMA)
    v_tile = load_rows(v, v_b, v_h, v_n, batch, kv_head, start, first, length, 0, C, DV, BV, TMA)
    kv_token0 = (batch * (HEADS // KV_GROUP) + kv_head) * tokens + start
    blocks = (length - first + C - 1) // C  # of queries, to the end of the text
    dk_acc = tl.zeros((C, BD), tl.float32)
    dv_acc = load_tile(dv + kv_token0 * DV, DV, first, length, 0, C, DV, BV).to(tl.float32)
    for h in range(KV_GROUP):
        head = kv_head * KV_GROUP + h
        token0 = (batch * HEADS + head) * tokens + start
        if MAP != GIVEN:
            dx = load_tile(dy + token0 * WIDTH, WIDTH, first, length, 0, C, WIDTH, BF)
            wk = load_part(map_k, head // MAP_GROUP, D, BD, WIDTH, 0, BF, TMA)
            dk_acc = tl.dot(dx, tl.trans(wk), dk_acc, input_precision=PRECISION)
        if WINDOW > 0:
            gate = tl.log2(tl.sigmoid(tl.load(window_factor + head).to(tl.float32)))
            for c in range(0, tl.minimum(REACH + 1, blocks)):
                query0 = first + c * C
                query = query0 + tl.arange(0, C)
                near, far = pair_masks(query[None, :], key[:, None], offset, WINDOW, TERRACED)
                q_tile = load_rows(q, q_b, q_h, q_n, batch, head, start, query0, length, 0, C, D, BD, TMA)
                g_tile = load_rows(grad, g_b, g_h, g_n, batch, head, start, query0, length, 0, C, DV, BV, TMA)
                r = load_vector(inverse + token0, query0, length, C)
                base = load_vector(maximum + token0, query0, length, C) - gate
                s = cap(tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale, SOFTCAP)
                w = tl.exp2(tl.where(near, s * LOG2E - base[None, :], -float("inf")))
                dv_acc = tl.dot((w * r[None, :]).to(dtype), g_tile, dv_acc, input_precision=PRECISION)
                product = load_vector(delta + token0, query0, length, C)
                a = load_vector(linear_part + token0, query0, length, C)
                best = load_vector(place + token0, query0, length, C)
                dw = (tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION) - product[None, :]) * r[None, :]
                ds = w * dw + tl.where(best[None, :] == key[:, None], a[None, :], 0.0)
                ds = times_slope(ds, s, SOFTCAP) * scale
                dk_acc = tl.dot(ds.to(dtype), q_tile, dk_acc, input_precision=PRECISION)
        if HAS_SINKS:  # what the sinks of this text got from all queries, gathered by the query side
            at = (row * HEADS + head).to(tl.int64) * SINKS
            inside = tl.minimum(SINKS - offset, length)
            dk_acc += load_tile(sink_dk + (at + offset) * D, D, first, inside, 0, C, D, BD)
            dv_acc += load_tile(sink_dv + (at + offset) * DV, DV, first, inside, 0, C, DV, BV)
    store_tile(dk + kv_token0 * D, D, first, length, 0, dk_acc, C, D, BD)
    store_tile(dv + kv_token0 * DV, DV, first, length, 0, dv_acc, C, DV, BV)
