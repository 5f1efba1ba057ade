"""Backward pass: dq by queries; dk and dv of slots by block, added up in a fixed order; dk and dv of the row by keys.

With w_ij = exp(s_ij - lse_i), ds_ij = w_ij (do_i.v_j - do_i.o_i), as in flash attention. A key is seen through the row
by the queries of its window and, having left it, to the end of that block; and through the slots of every later block
that it is kept in. `slot_gradients` writes what each block gives to each slot, `add_slots` adds these to the keys block
by block, and `key_gradients` adds the row. No two programs write to one place, so results are the same bits each time.

Keys that a state held are read as in the forward pass, and get no gradient: what a block gives to their slots is left
where it is.
Shapes: as in forward.py; part_k, part_v [B, KV, blocks, s + P, D or Dv]; total_k, total_v [B, KV, N, D or Dv] fp32.
Bytes: q, do and dq (w + 2 C) / C times, k and v as in the forward pass, part_k and part_v once written and once read.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

import triton
import triton.language as tl

from lolcats.ops.hybrid.kernels.tiles import load_tile, load_vector, store_tile, store_vector
from lolcats.ops.near.kernels.tiles import (
    SIZES,
    capped,
    filled_slots,
    held_code,
    load_keys,
    read_text,
    row_begin,
    row_limits,
    slope,
    slot_keys,
    slots_visible,
    window_visible,
)


@triton.jit
def add_to_query(
    dq, q_tile, k_tile, v_tile, g_tile, visible, base, delta, scale, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):
    """dq [queries, D] plus what comes from a tile of keys; `visible` is [queries, keys]."""
    s = capped(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, SOFTCAP)
    w = tl.exp2(tl.where(visible, s - base[:, None], -float("inf")))
    dw = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION) - delta[:, None]
    ds = slope(w * dw, s, scale, SOFTCAP)
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)


@triton.jit
def add_to_keys(
    dk, dv, q_tile, k_tile, v_tile, g_tile, visible, base, delta, scale, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):
    """dk and dv [keys, D or Dv] plus what comes from a tile of queries; `visible` is [keys, queries]."""
    s = capped(tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION), scale, SOFTCAP)
    w = tl.exp2(tl.where(visible, s - base[None, :], -float("inf")))
    dv = tl.dot(w.to(g_tile.dtype), g_tile, dv, input_precision=PRECISION)
    dw = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION) - delta[None, :]
    ds = slope(w * dw, s, scale, SOFTCAP)
    return tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION), dv


@triton.jit(do_not_specialize=SIZES)
def query_gradients(
    q, k, v, before, until, lengths, start, held_k, held_v, out, grad, lse, delta, dq,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, g_b, g_h, g_n, d_b, d_h, d_n,
    tokens, blocks, window, pairs, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    SINKS: tl.constexpr, HAS_PAIRS: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_STATE: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq, and delta_i = do_i.o_i for the other kernels. Grid: (HEADS, ROWS of queries, batch). ROWS divides C."""
    head = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    batch = tl.program_id(2).to(tl.int64)
    count, offset = read_text(lengths, start, batch, tokens, HAS_LENGTHS, HAS_STATE)
    kv_row = batch * (HEADS // GROUP) + head // GROUP
    begin = first // C * C
    query = first + tl.arange(0, ROWS)
    k += batch * k_b + (head // GROUP) * k_h
    v += batch * v_b + (head // GROUP) * v_h
    held_k += kv_row * (window + pairs + SINKS) * D
    held_v += kv_row * (window + pairs + SINKS) * DV
    before += (kv_row * blocks + begin // C) * pairs
    until += kv_row * (pairs + tokens)
    token0 = (batch * HEADS + head) * tokens
    q_tile = load_tile(q + batch * q_b + head * q_h, q_n, first, count, 0, ROWS, D, BD)
    g_tile = load_tile(grad + batch * g_b + head * g_h, g_n, first, count, 0, ROWS, DV, BV)
    o_tile = load_tile(out + batch * o_b + head * o_h, o_n, first, count, 0, ROWS, DV, BV)
    products = tl.sum(g_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    store_vector(delta + token0, first, tokens, products, ROWS)
    base = load_vector(lse + token0, first, count, ROWS)
    acc = tl.zeros((ROWS, BD), tl.float32)
    alive = first < count  # a block of padding reads nothing

    filled = tl.where(alive, filled_slots(begin, window, pairs, SINKS, HAS_PAIRS, HAS_STATE), 0)
    for slot0 in tl.range(0, filled, KEYS, num_stages=STAGES):
        slot = slot0 + tl.arange(0, KEYS)
        code, since, limit = slot_keys(
            before, until, slot, offset, count, window, pairs, window, SINKS, HAS_PAIRS, HAS_STATE
        )
        k_tile = load_keys(k, k_n, held_k, code, count, D, BD, HAS_STATE)
        v_tile = load_keys(v, v_n, held_v, code, count, DV, BV, HAS_STATE)
        visible = slots_visible(query[:, None], since[None, :], limit[None, :], count)
        acc = add_to_query(acc, q_tile, k_tile, v_tile, g_tile, visible, base, products, scale, SOFTCAP, PRECISION)

    end = tl.where(alive, tl.minimum(first + ROWS, count), 0)
    for key0 in tl.range(
        tl.minimum(row_begin(first, begin, window, HAS_PAIRS, HAS_STATE), end), end, KEYS, num_stages=STAGES
    ):
        token = key0 + tl.arange(0, KEYS)
        limit = row_limits(until, token, tokens, window, pairs, HAS_PAIRS)
        code = token
        if HAS_STATE:
            code = held_code(token, offset, window)
        k_tile = load_keys(k, k_n, held_k, code, count, D, BD, HAS_STATE)
        v_tile = load_keys(v, v_n, held_v, code, count, DV, BV, HAS_STATE)
        visible = window_visible(
            query[:, None], token[None, :], limit[None, :], offset, count, window, SINKS, HAS_PAIRS
        )
        acc = add_to_query(acc, q_tile, k_tile, v_tile, g_tile, visible, base, products, scale, SOFTCAP, PRECISION)
    store_tile(dq + batch * d_b + head * d_h, d_n, first, tokens, 0, acc, ROWS, D, BD)


@triton.jit(do_not_specialize=SIZES)
def slot_gradients(
    q, k, v, before, until, lengths, start, held_k, held_v, grad, lse, delta, part_k, part_v,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    tokens, blocks, window, pairs, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    SINKS: tl.constexpr, HAS_PAIRS: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_STATE: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What the queries of a block give to KEYS of its slots. Grid: (KEYS of slots, blocks, batch x key heads)."""
    slot0 = tl.program_id(0) * KEYS
    begin = tl.program_id(1) * C
    kv_row = tl.program_id(2).to(tl.int64)
    batch = kv_row // (HEADS // GROUP)
    kv_head = kv_row % (HEADS // GROUP)
    count, offset = read_text(lengths, start, batch, tokens, HAS_LENGTHS, HAS_STATE)
    if (begin >= count) | (slot0 >= filled_slots(begin, window, pairs, SINKS, HAS_PAIRS, HAS_STATE)):
        return
    at = kv_row * blocks + begin // C
    slot = slot0 + tl.arange(0, KEYS)
    code, since, limit = slot_keys(
        before + at * pairs,
        until + kv_row * (pairs + tokens),
        slot,
        offset,
        count,
        window,
        pairs,
        window,
        SINKS,
        HAS_PAIRS,
        HAS_STATE,
    )
    held_k += kv_row * (window + pairs + SINKS) * D
    held_v += kv_row * (window + pairs + SINKS) * DV
    k_tile = load_keys(k + batch * k_b + kv_head * k_h, k_n, held_k, code, count, D, BD, HAS_STATE)
    v_tile = load_keys(v + batch * v_b + kv_head * v_h, v_n, held_v, code, count, DV, BV, HAS_STATE)
    dk = tl.zeros((KEYS, BD), tl.float32)
    dv = tl.zeros((KEYS, BV), tl.float32)
    for step in tl.range(0, GROUP * (C // ROWS), num_stages=STAGES):
        head = kv_head * GROUP + step // (C // ROWS)
        first = begin + step % (C // ROWS) * ROWS
        query = first + tl.arange(0, ROWS)
        token0 = (batch * HEADS + head) * tokens
        q_tile = load_tile(q + batch * q_b + head * q_h, q_n, first, count, 0, ROWS, D, BD)
        g_tile = load_tile(grad + batch * g_b + head * g_h, g_n, first, count, 0, ROWS, DV, BV)
        base = load_vector(lse + token0, first, count, ROWS)
        products = load_vector(delta + token0, first, count, ROWS)
        visible = slots_visible(query[None, :], since[:, None], limit[:, None], count)
        dk, dv = add_to_keys(
            dk, dv, q_tile, k_tile, v_tile, g_tile, visible, base, products, scale, SOFTCAP, PRECISION
        )  # fmt: skip
    store_tile(part_k + at * (SINKS + pairs) * D, D, slot0, SINKS + pairs, 0, dk, KEYS, D, BD)
    store_tile(part_v + at * (SINKS + pairs) * DV, DV, slot0, SINKS + pairs, 0, dv, KEYS, DV, BV)


@triton.jit
def load_block(
    part, before, block, column, count, offset, window, pairs, size: tl.constexpr,
    SINKS: tl.constexpr, HAS_PAIRS: tl.constexpr, HAS_STATE: tl.constexpr, C: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """New tokens [SLOTS] in the slots of a block, -1 where none is, and some columns of what the block gives them."""
    slot = tl.arange(0, SLOTS)
    filled = tl.where(block * C < count, filled_slots(block * C, window, pairs, SINKS, HAS_PAIRS, HAS_STATE), 0)
    token = slot - offset
    if HAS_PAIRS:
        pair = slot - SINKS
        index = tl.load(before + block * pairs + pair, mask=(pair >= 0) & (slot < filled), other=0)
        token = tl.where(pair >= 0, index - (pairs + window), token)
        token = tl.where((pair >= 0) & (token + offset < SINKS), -1, token)
    token = tl.where((slot < filled) & (token >= 0) & (token < count), token, -1)
    at = tl.cast(block, tl.int64) * (SINKS + pairs) * size + slot[:, None] * size + column
    return token, tl.load(part + at, mask=(token >= 0)[:, None] & (column < size), other=0.0)


@triton.jit
def add_blocks(
    part, total, before, column, count, offset, window, pairs, size: tl.constexpr,
    SINKS: tl.constexpr, HAS_PAIRS: tl.constexpr, HAS_STATE: tl.constexpr, C: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Add some columns of `part` [blocks, s + P, size] to `total` [N, size], block by block."""
    token, x = load_block(
        part, before, 0, column, count, offset, window, pairs, size, SINKS, HAS_PAIRS, HAS_STATE, C, SLOTS
    )
    for block in range(0, (count + C - 1) // C):
        following, y = load_block(
            part, before, block + 1, column, count, offset, window, pairs, size, SINKS, HAS_PAIRS, HAS_STATE, C, SLOTS
        )
        place = total + token.to(tl.int64)[:, None] * size + column
        mask = (token >= 0)[:, None] & (column < size)
        tl.store(place, tl.load(place, mask=mask, other=0.0) + x.to(tl.float32), mask=mask)  # no key has two slots
        tl.debug_barrier()  # the next block may add to the same keys, by other threads
        token = following
        x = y


@triton.jit(do_not_specialize=SIZES)
def add_slots(
    part_k, part_v, before, lengths, start, total_k, total_v, tokens, blocks, window, pairs, KV_HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, SINKS: tl.constexpr, HAS_PAIRS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_STATE: tl.constexpr, C: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (COLUMNS of keys or values, batch x key heads, 2: keys and values)."""
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    kv_row = tl.program_id(1).to(tl.int64)
    count, offset = read_text(lengths, start, kv_row // KV_HEADS, tokens, HAS_LENGTHS, HAS_STATE)
    before += kv_row * blocks * pairs
    part = kv_row * blocks * (SINKS + pairs)
    total = kv_row * tokens
    if tl.program_id(2) == 0:
        add_blocks(
            part_k + part * D, total_k + total * D,
            before, column, count, offset, window, pairs, D, SINKS, HAS_PAIRS, HAS_STATE, C, SLOTS,
        )  # fmt: skip
    else:
        add_blocks(
            part_v + part * DV, total_v + total * DV,
            before, column, count, offset, window, pairs, DV, SINKS, HAS_PAIRS, HAS_STATE, C, SLOTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def key_gradients(
    q, k, v, until, lengths, start, grad, lse, delta, total_k, total_v, dk, dv,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    tokens, window, pairs, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    SINKS: tl.constexpr, HAS_PAIRS: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_STATE: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv: what the slots gave, and the row. Grid: (KEYS of the row, key heads, batch)."""
    key0 = tl.program_id(0) * KEYS
    kv_head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    kv_row = batch * (HEADS // GROUP) + kv_head
    count, offset = read_text(lengths, start, batch, tokens, HAS_LENGTHS, HAS_STATE)
    token = key0 + tl.arange(0, KEYS)
    end = key0 + KEYS - 1 + window
    limit = row_limits(until + kv_row * (pairs + tokens), token, tokens, window, pairs, HAS_PAIRS)
    if HAS_PAIRS:  # later blocks see a key through their slots
        limit = tl.minimum(limit, (token + window) // C * C + C)
        end = end // C * C + C
    k_tile = load_keys(k + batch * k_b + kv_head * k_h, k_n, k, token, count, D, BD, False)
    v_tile = load_keys(v + batch * v_b + kv_head * v_h, v_n, v, token, count, DV, BV, False)
    dk_acc = tl.zeros((KEYS, BD), tl.float32)
    dv_acc = tl.zeros((KEYS, BV), tl.float32)
    if HAS_PAIRS or SINKS > 0:
        dk_acc = load_tile(total_k + kv_row * tokens * D, D, key0, tokens, 0, KEYS, D, BD)
        dv_acc = load_tile(total_v + kv_row * tokens * DV, DV, key0, tokens, 0, KEYS, DV, BV)
    parts = tl.maximum(tl.minimum(end, count) - key0 + ROWS - 1, 0) // ROWS
    for step in tl.range(0, GROUP * parts, num_stages=STAGES):
        head = kv_head * GROUP + step // parts
        first = key0 + step % parts * ROWS
        query = first + tl.arange(0, ROWS)
        token0 = (batch * HEADS + head) * tokens
        q_tile = load_tile(q + batch * q_b + head * q_h, q_n, first, count, 0, ROWS, D, BD)
        g_tile = load_tile(grad + batch * g_b + head * g_h, g_n, first, count, 0, ROWS, DV, BV)
        base = load_vector(lse + token0, first, count, ROWS)
        products = load_vector(delta + token0, first, count, ROWS)
        visible = window_visible(
            query[None, :], token[:, None], limit[:, None], offset, count, window, SINKS, HAS_PAIRS
        )
        dk_acc, dv_acc = add_to_keys(
            dk_acc, dv_acc, q_tile, k_tile, v_tile, g_tile, visible, base, products, scale, SOFTCAP, PRECISION
        )  # fmt: skip
    store_tile(dk + batch * dk_b + kv_head * dk_h, dk_n, key0, tokens, 0, dk_acc, KEYS, D, BD)
    store_tile(dv + batch * dv_b + kv_head * dv_h, dv_n, key0, tokens, 0, dv_acc, KEYS, DV, BV)
