"""Backward pass of the linear half to the values: dv_j = sum_i w_ij do_i / d_i over linear pairs.

Algorithm, for a block of keys of one key head, over the query heads of its group: phi(k) times the state of later
queries (phi(q)^T do / d, states.py), and phi(k).phi(q) times do / d for the queries in reach. It makes features again
that `key_features` (backward_features.py) has made too: the accumulators of both in one kernel do not fit into the
registers (1.2 kB of spills a thread).

Shapes and bytes: as in backward_features.py; dv [B, KV, N, Dv], once per key head.
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
    changing_one,
    load_bias,
    load_part,
    load_rows,
    load_vector,
    map_features,
    pair_masks,
    read_row,
    real_keys,
    store_tile,
)


@triton.jit(do_not_specialize=COUNTS)
def key_values(
    q,
    k,
    map_q,
    map_k,
    bias_q,
    bias_k,
    factor,
    decay,
    local,
    local_decay,
    after,
    rows,
    grad,
    inverse,
    dv,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
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
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
):
    """dv of a block of keys, without the softmax half. Grid: (key heads, blocks, rows)."""
    kv_head = tl.program_id(0)
    block = tl.program_id(1)
    row = tl.program_id(2)
    batch, start, length, offset = read_row(rows, row, tokens, HAS_ROWS)
    first = block * C
    if first >= length:
        return
    dtype = dv.dtype.element_ty
    state_dtype = tl.bfloat16 if dtype == tl.float16 else dtype
    group = first // T
    ahead = (group + 1) * (T // C) - 1 - block  # blocks of the tile after this one
    PARTS: tl.constexpr = 2 if MAP == HEDGEHOG else 1
    key = real_keys(first + tl.arange(0, C), offset, SINKS)
    blocks = (length - first + C - 1) // C  # of queries, to the end of the text
    acc = tl.zeros((C, BV), tl.float32)
    for h in range(KV_GROUP):
        head = kv_head * KV_GROUP + h
        map_head = head // MAP_GROUP
        token0 = (batch * HEADS + head) * tokens + start
        phi_scale = 1.0
        if HAS_FACTOR:
            phi_scale = tl.exp(tl.load(factor + head).to(tl.float32))
        if MAP != GIVEN:
            w = load_part(map_k, map_head, D, BD, WIDTH, 0, BF, TMA)
            bk = load_bias(bias_k + map_head * WIDTH, WIDTH, BF, MAP)
            k_tile = load_rows(k, k_b, k_h, k_n, batch, kv_head, start, first, length, 0, C, D, BD, TMA)
            phi_exact = map_features(k_tile, w, bk, 1.0, WIDTH, BF, MAP, PRECISION)
        else:
            k_phi = load_rows(map_k, fk_b, fk_h, F, batch, map_head, start, first, length, 0, C, F, BF, TMA)
            phi_exact = (k_phi.to(tl.float32),)
        phi_k = ()
        for i in tl.static_range(PARTS):
            phi_k = phi_k + (phi_exact[i].to(dtype),)
        if HAS_DECAY:
            key_losses = load_vector(decay + token0, first, length, C)
            between = -tl.cumsum(key_losses, 0)  # from the key to the query block that comes next

        # the state: later queries
        if HAS_STATES:
            at = (row * HEADS + head).to(tl.int64) * groups + group
            at_after = (row * HEADS + head).to(tl.int64) * segments + group // segment_tiles
            fade = 1.0
            if HAS_DECAY and SPLIT:
                fade = tl.exp(tl.load(local_decay + at))
            weight = (key < length).to(tl.float32)
            if HAS_DECAY:
                to_end = tl.sum(key_losses, 0) + between
                for t in range(1, ahead + 1):
                    to_end += tl.sum(load_vector(decay + token0, first + t * C, length, C), 0)
                weight *= tl.exp(to_end)
            for i in tl.static_range(PARTS):
                weighted = (phi_k[i] * weight[:, None]).to(state_dtype)
                kv = load_part(local, at * PARTS + i, WIDTH, BF, DV, 0, BV, TMA)
                acc = tl.dot(weighted, kv, acc, input_precision=PRECISION)
                if SPLIT:
                    if HAS_DECAY:
                        weighted = (weighted * fade).to(state_dtype)
                    kv = load_part(after, at_after * PARTS + i, WIDTH, BF, DV, 0, BV, TMA)
                    acc = tl.dot(weighted, kv, acc, input_precision=PRECISION)

        # queries in reach
        if HAS_DECAY:
            between += tl.sum(key_losses, 0) * (1.0 if FIRST > 0 else 0.0)
            for c in range(1, FIRST):
                between += tl.sum(load_vector(decay + token0, first + c * C, length, C), 0)
        if MAP != GIVEN:
            wq = load_part(map_q, head, D, BD, WIDTH, 0, BF, TMA)
            bq = load_bias(bias_q + head * WIDTH, WIDTH, BF, MAP)
        for c in range(FIRST, tl.minimum(REACH + 1 + ahead, blocks)):
            one = changing_one(inverse + token0, dtype)
            query0 = first + c * C
            query = query0 + tl.arange(0, C)
            near, far = pair_masks(query[None, :], key[:, None], offset, WINDOW, TERRACED)
            if MAP != GIVEN:
                q_tile = load_rows(q, q_b, q_h, q_n, batch, head, start, query0, length, 0, C, D, BD, TMA)
                phi = map_features(q_tile, wq, bq, phi_scale, WIDTH, BF, MAP, PRECISION)
            else:
                q_phi = load_rows(map_q, fq_b, fq_h, F, batch, head, start, query0, length, 0, C, F, BF, TMA)
                phi = (q_phi.to(tl.float32) * phi_scale,)
            pairs = tl.zeros((C, C), tl.float32)
            for i in tl.static_range(PARTS):
                pairs = tl.dot(phi_k[i] * one, tl.trans(phi[i].to(dtype)), pairs, input_precision=PRECISION)
            faded = tl.where(far, load_vector(inverse + token0, query0, length, C)[None, :], 0.0)
            if HAS_DECAY:
                losses = load_vector(decay + token0, query0, length, C)
                faded *= tl.exp(tl.where(far, between[:, None] + tl.cumsum(losses, 0)[None, :], 0.0))
                between += tl.sum(losses, 0)
            g_tile = load_rows(grad, g_b, g_h, g_n, batch, head, start, query0, length, 0, C, DV, BV, TMA)
            acc = tl.dot((pairs * faded).to(dtype), g_tile, acc, input_precision=PRECISION)
    token0 = (batch * (HEADS // KV_GROUP) + kv_head) * tokens + start
    store_tile(dv + token0 * DV, DV, first, length, 0, acc, C, DV, BV)
