"""Backward pass of the linear half: gradients of phi(q), phi(k) and v, and through the maps those of their weights.

With numerator n, denominator d, out o = n / d and do given, the gradient of a weight w_ij of the shared denominator is
dw_ij = (do_i.v_j - do_i.o_i) / d_i, for softmax and linear pairs alike. So, over linear pairs,

    dphi(q_i) = sum_j dw_ij phi(k_j),   dphi(k_j) = sum_i dw_ij phi(q_i),   dv_j = sum_i w_ij do_i / d_i.

Older keys (later queries) come through the states of states.py, the others pair by pair. Over a row the sum of w dw is
zero, so a_i = phi(q_i).dphi(q_i), the sum over linear pairs, is also minus that over softmax pairs: from it follow the
gradients of the window factor (-(1 - g) sum a), of the scale of the features (sum a), of the row maximum
(backward_inputs.py) and, with b_j = phi(k_j).dphi(k_j), of the decay.

Attention transfer needs nothing else: no softmax pair is visited there.

Shapes: dy [B, H, N, width], the gradient of x W (of phi itself for given features); a, b [B, H, N] fp32.
Bytes: q, do, dy once per query head; k, v and dv once per key head; one state per tile each way.
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
    HEDGEHOG,
    load_bias,
    load_part,
    load_rows,
    load_sums,
    load_tile,
    load_vector,
    map_backward,
    map_features,
    pair_masks,
    read_row,
    real_keys,
    store_tile,
    store_vector,
)


@triton.jit(do_not_specialize=COUNTS)
def output_terms(out, grad, delta, o_b, o_h, o_n, g_b, g_h, g_n, tokens, HEADS: tl.constexpr, DV: tl.constexpr,
                 BV: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """delta_i = do_i.o_i, fp32. Grid: (blocks of C, batch x HEADS)."""
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    first = tl.program_id(0) * C
    o = load_tile(out + batch * o_b + head * o_h, o_n, first, tokens, 0, C, DV, BV).to(tl.float32)
    g = load_tile(grad + batch * g_b + head * g_h, g_n, first, tokens, 0, C, DV, BV).to(tl.float32)
    store_vector(delta + (batch * HEADS + head) * tokens, first, tokens, tl.sum(o * g, 1), C)


@triton.jit(do_not_specialize=COUNTS)
def query_features(
    q,
    k,
    v,
    map_q,
    map_k,
    bias_q,
    bias_k,
    factor,
    decay,
    local,
    local_sum,
    local_decay,
    before,
    before_sum,
    rows,
    grad,
    inverse,
    delta,
    dy,
    linear_part,
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
    fq_b,
    fq_h,
    fk_b,
    fk_h,
    tokens,
    segments,
    groups,
    segment_tiles,
    REACH: tl.constexpr,
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
    HAS_FACTOR: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_STATES: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    NEED_DY: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    T: tl.constexpr,
):
    """a_i and dy of a block of queries. Grid: (HEADS, blocks, rows)."""
    head = tl.program_id(0)
    block = tl.program_id(1)
    row = tl.program_id(2)
    batch, start, length, offset = read_row(rows, row, tokens, HAS_ROWS)
    first = block * C
    if first >= length:
        return
    dtype = grad.dtype if TMA else grad.dtype.element_ty
    state_dtype = tl.bfloat16 if dtype == tl.float16 else dtype
    group = first // T
    behind = block - group * (T // C)  # blocks of the tile before this one
    kv_head = head // KV_GROUP
    map_head = head // MAP_GROUP
    token0 = (batch * HEADS + head) * tokens + start
    decay += token0
    PARTS: tl.constexpr = 2 if MAP == HEDGEHOG else 1
    query = first + tl.arange(0, C)
    g_tile = load_rows(grad, g_b, g_h, g_n, batch, head, start, first, length, 0, C, DV, BV, TMA)
    product = load_vector(delta + token0, first, length, C)

    # the state
    if HAS_DECAY:
        passed = tl.cumsum(load_vector(decay, first, length, C), 0)  # from the start of the reach
        for t in range(1, REACH + behind + 1):
            passed += tl.sum(load_vector(decay, first - t * C, length, C), 0)
    dphi_front = tl.zeros((C, BF), tl.float32)
    dphi_back = tl.zeros((C, BF), tl.float32)
    if HAS_STATES:
        row_head = (row * (HEADS // STATE_GROUP) + head // STATE_GROUP).to(tl.int64)
        at = row_head * groups + group
        at_before = row_head * segments + group // segment_tiles
        fade = 1.0
        if HAS_DECAY and SPLIT:
            fade = tl.exp(tl.load(local_decay + at))
        for i in tl.static_range(PARTS):
            k_sum = load_sums(
                local_sum + at * F, before_sum + at_before * F * (DV + 1) + F * DV, fade, i, SPLIT, WIDTH, BF
            )
            kv = load_part(local, at * PARTS + i, WIDTH, BF, DV, 0, BV, TMA)
            part = tl.dot(g_tile.to(state_dtype), tl.trans(kv), input_precision=PRECISION)
            if SPLIT:
                kv = load_part(before, at_before * PARTS + i, WIDTH, BF, DV, 0, BV, TMA)
                older = tl.dot(g_tile.to(state_dtype), tl.trans(kv), input_precision=PRECISION)
                part += older * fade
            part = part - product[:, None] * k_sum[None, :]
            if HAS_DECAY:
                part = part * tl.exp(passed)[:, None]
            if i == 0:
                dphi_front = part
            else:
                dphi_back = part

    # the keys in reach
    if MAP != GIVEN:
        wk = load_part(map_k, map_head, D, BD, WIDTH, 0, BF, TMA)
        bk = load_bias(bias_k + map_head * WIDTH, WIDTH, BF, MAP)
    for c in tl.range(-REACH - behind, MIXED, num_stages=STAGES):
        key0 = first + c * C
        key = real_keys(key0 + tl.arange(0, C), offset, SINKS)
        near, far = pair_masks(query[:, None], key[None, :], offset, WINDOW, TERRACED)
        v_tile = load_rows(v, v_b, v_h, v_n, batch, kv_head, start, key0, length, 0, C, DV, BV, TMA)
        dw = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION) - product[:, None]
        if HAS_DECAY:
            losses = load_vector(decay, key0, length, C)
            dw *= tl.exp(tl.where(far, passed[:, None] - tl.cumsum(losses, 0)[None, :], 0.0))
            passed -= tl.sum(losses, 0)
        dw = tl.where(far, dw, 0.0).to(dtype)
        if MAP != GIVEN:
            k_tile = load_rows(k, k_b, k_h, k_n, batch, kv_head, start, key0, length, 0, C, D, BD, TMA)
            phi_k = map_features(k_tile, wk, bk, 1.0, WIDTH, BF, MAP, PRECISION)
        else:
            k_phi = load_rows(map_k, fk_b, fk_h, F, batch, map_head, start, key0, length, 0, C, F, BF, TMA)
            phi_k = (k_phi.to(tl.float32),)
        dphi_front = tl.dot(dw, phi_k[0].to(dtype), dphi_front, input_precision=PRECISION)
        if MAP == HEDGEHOG:
            dphi_back = tl.dot(dw, phi_k[1].to(dtype), dphi_back, input_precision=PRECISION)

    r = load_vector(inverse + token0, first, length, C)
    if HAS_FACTOR:
        r *= tl.exp(tl.load(factor + head).to(tl.float32))
    dphi_front = dphi_front * r[:, None]
    dphi_back = dphi_back * r[:, None]
    if MAP != GIVEN:
        q_tile = load_rows(q, q_b, q_h, q_n, batch, head, start, first, length, 0, C, D, BD, TMA)
        w = load_part(map_q, head, D, BD, WIDTH, 0, BF, TMA)
        bq = load_bias(bias_q + head * WIDTH, WIDTH, BF, MAP)
        phi = map_features(q_tile, w, bq, 1.0, WIDTH, BF, MAP, PRECISION)
    else:
        q_phi = load_rows(map_q, fq_b, fq_h, F, batch, head, start, first, length, 0, C, F, BF, TMA)
        phi = (q_phi.to(tl.float32),)
    a = tl.sum(phi[0] * dphi_front, 1)
    if MAP == HEDGEHOG:
        a += tl.sum(phi[1] * dphi_back, 1)
    store_vector(linear_part + token0, first, length, a, C)
    if NEED_DY:
        dx = map_backward(phi, (dphi_front, dphi_back), MAP)
        store_tile(dy + token0 * WIDTH, WIDTH, first, length, 0, dx, C, WIDTH, BF)


@triton.jit(do_not_specialize=COUNTS)
def key_features(
    q,
    k,
    v,
    map_q,
    map_k,
    bias_q,
    bias_k,
    factor,
    decay,
    local,
    local_sum,
    local_decay,
    after,
    after_sum,
    rows,
    grad,
    inverse,
    delta,
    dy,
    key_part,
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
    fq_b,
    fq_h,
    fk_b,
    fk_h,
    tokens,
    segments,
    groups,
    segment_tiles,
    REACH: tl.constexpr,
    FIRST: tl.constexpr,
    KV_GROUP: tl.constexpr,
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
    HAS_FACTOR: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_STATES: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    NEED_DY: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
):
    """b_j and dy of a block of keys. Grid: (HEADS, blocks, rows).

    Linear pairs start with query block FIRST, counted from the block of the keys.
    """
    head = tl.program_id(0)
    block = tl.program_id(1)
    row = tl.program_id(2)
    batch, start, length, offset = read_row(rows, row, tokens, HAS_ROWS)
    first = block * C
    if first >= length:
        return
    dtype = grad.dtype if TMA else grad.dtype.element_ty
    state_dtype = tl.bfloat16 if dtype == tl.float16 else dtype
    group = first // T
    ahead = (group + 1) * (T // C) - 1 - block  # blocks of the tile after this one
    kv_head = head // KV_GROUP
    map_head = head // MAP_GROUP
    token0 = (batch * HEADS + head) * tokens + start
    PARTS: tl.constexpr = 2 if MAP == HEDGEHOG else 1
    key = real_keys(first + tl.arange(0, C), offset, SINKS)
    counted = (key < length).to(tl.float32)
    blocks = (length - first + C - 1) // C  # of queries, to the end of the text
    phi_scale = 1.0
    if HAS_FACTOR:
        phi_scale = tl.exp(tl.load(factor + head).to(tl.float32))
    v_tile = load_rows(v, v_b, v_h, v_n, batch, kv_head, start, first, length, 0, C, DV, BV, TMA)
    if HAS_DECAY:
        key_losses = load_vector(decay + token0, first, length, C)
        between = -tl.cumsum(key_losses, 0)  # from the key to the query block that comes next

    # the state: later queries
    dphi_front = tl.zeros((C, BF), tl.float32)
    dphi_back = tl.zeros((C, BF), tl.float32)
    if HAS_STATES:
        at = (row * HEADS + head).to(tl.int64) * groups + group
        at_after = (row * HEADS + head).to(tl.int64) * segments + group // segment_tiles
        fade = 1.0
        if HAS_DECAY and SPLIT:
            fade = tl.exp(tl.load(local_decay + at))
        weight = counted
        if HAS_DECAY:
            to_end = tl.sum(key_losses, 0) + between
            for t in range(1, ahead + 1):
                to_end += tl.sum(load_vector(decay + token0, first + t * C, length, C), 0)
            weight *= tl.exp(to_end)
        for i in tl.static_range(PARTS):
            k_sum = load_sums(
                local_sum + at * F, after_sum + at_after * F * (DV + 1) + F * DV, fade, i, SPLIT, WIDTH, BF
            )
            # Two products each rather than one sum: the sum would go through registers.
            kv = load_part(local, at * PARTS + i, WIDTH, BF, DV, 0, BV, TMA)
            part = tl.dot(v_tile.to(state_dtype), tl.trans(kv), input_precision=PRECISION)
            if SPLIT:
                kv = load_part(after, at_after * PARTS + i, WIDTH, BF, DV, 0, BV, TMA)
                part += tl.dot(v_tile.to(state_dtype), tl.trans(kv), input_precision=PRECISION) * fade
            part = (part + k_sum[None, :]) * weight[:, None]
            if i == 0:
                dphi_front = part
            else:
                dphi_back = part

    # queries in reach
    if HAS_DECAY:
        between += tl.sum(key_losses, 0) * (1.0 if FIRST > 0 else 0.0)
        for c in range(1, FIRST):
            between += tl.sum(load_vector(decay + token0, first + c * C, length, C), 0)
    if MAP != GIVEN:
        wq = load_part(map_q, head, D, BD, WIDTH, 0, BF, TMA)
        bq = load_bias(bias_q + head * WIDTH, WIDTH, BF, MAP)
    for c in range(FIRST, tl.minimum(REACH + 1 + ahead, blocks)):
        query0 = first + c * C
        query = query0 + tl.arange(0, C)
        near, far = pair_masks(query[None, :], key[:, None], offset, WINDOW, TERRACED)
        r = load_vector(inverse + token0, query0, length, C)
        product = load_vector(delta + token0, query0, length, C)
        if MAP != GIVEN:
            q_tile = load_rows(q, q_b, q_h, q_n, batch, head, start, query0, length, 0, C, D, BD, TMA)
            phi = map_features(q_tile, wq, bq, phi_scale, WIDTH, BF, MAP, PRECISION)
        else:
            q_phi = load_rows(map_q, fq_b, fq_h, F, batch, head, start, query0, length, 0, C, F, BF, TMA)
            phi = (q_phi.to(tl.float32) * phi_scale,)
        g_tile = load_rows(grad, g_b, g_h, g_n, batch, head, start, query0, length, 0, C, DV, BV, TMA)
        faded = tl.where(far, r[None, :], 0.0)
        if HAS_DECAY:
            losses = load_vector(decay + token0, query0, length, C)
            faded *= tl.exp(tl.where(far, between[:, None] + tl.cumsum(losses, 0)[None, :], 0.0))
            between += tl.sum(losses, 0)
        dw = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION) - product[None, :]
        dw = (dw * faded).to(dtype)
        dphi_front = tl.dot(dw, phi[0].to(dtype), dphi_front, input_precision=PRECISION)
        if MAP == HEDGEHOG:
            dphi_back = tl.dot(dw, phi[1].to(dtype), dphi_back, input_precision=PRECISION)

    if MAP != GIVEN:
        w = load_part(map_k, map_head, D, BD, WIDTH, 0, BF, TMA)
        bk = load_bias(bias_k + map_head * WIDTH, WIDTH, BF, MAP)
        k_tile = load_rows(k, k_b, k_h, k_n, batch, kv_head, start, first, length, 0, C, D, BD, TMA)
        phi_k = map_features(k_tile, w, bk, 1.0, WIDTH, BF, MAP, PRECISION)
    else:
        k_phi = load_rows(map_k, fk_b, fk_h, F, batch, map_head, start, first, length, 0, C, F, BF, TMA)
        phi_k = (k_phi.to(tl.float32),)
    if HAS_DECAY:
        part = tl.sum(phi_k[0] * dphi_front, 1)
        if MAP == HEDGEHOG:
            part += tl.sum(phi_k[1] * dphi_back, 1)
        store_vector(key_part + token0, first, length, part, C)
    if NEED_DY:
        dx = map_backward(phi_k, (dphi_front, dphi_back), MAP)
        store_tile(dy + token0 * WIDTH, WIDTH, first, length, 0, dx, C, WIDTH, BF)


@triton.jit(do_not_specialize=COUNTS)
def weight_kernel(
    x,
    dy,
    partial,
    x_b,
    x_h,
    x_n,
    tokens,
    splits,
    X_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    WIDTH: tl.constexpr,
    BF: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
):
    """x^T dy over every `splits`-th block: [batch, HEADS, splits, D + 1, WIDTH]; the last row is the sum of dy."""
    head = tl.program_id(0)
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    x += batch * x_b + (head // X_GROUP) * x_h
    dy += (batch * HEADS + head) * tokens * WIDTH
    acc = tl.zeros((BD, BF), tl.float32)
    column_sum = tl.zeros((BF,), tl.float32)
    for block in range(split, (tokens + C - 1) // C, splits):
        x_tile = load_tile(x, x_n, block * C, tokens, 0, C, D, BD)
        dy_tile = load_tile(dy, WIDTH, block * C, tokens, 0, C, WIDTH, BF)
        acc = tl.dot(tl.trans(x_tile), dy_tile, acc, input_precision=PRECISION)
        column_sum += tl.sum(dy_tile.to(tl.float32), 0)
    partial += ((batch * HEADS + head) * splits + split) * (D + 1) * WIDTH
    d = tl.arange(0, BD)
    f = tl.arange(0, BF)
    tl.store(partial + d[:, None] * WIDTH + f[None, :], acc, mask=(d < D)[:, None] & (f < WIDTH)[None, :])
    tl.store(partial + D * WIDTH + f, column_sum, mask=f < WIDTH)
