"""Forward pass: a program computes the outputs of some queries of one block and one query head.

Algorithm: softmax over the slots of the block (sinks and kept pairs, gathered through pointers), then over the row of
keys that are in a window or leave it within the block (tiles.py says which query sees which), tile by tile with a
running row maximum, as in flash attention. A learned sink is where maximum and denominator begin. With SAVE the
logarithm of the denominator, to the base of two, is kept for the backward pass; infinity where a query sees nothing.

Shapes: q, out [B, H, N, D or Dv]; k, v [B, KV, N, .]; before [B, KV, blocks, P]; until [B, KV, P + N]; held rows
[B, KV, w + P + s, .], with the largest w and P where key heads differ.
Bytes: q and out once per query head; keys and values (w + C + P + s) / C times per query head, mostly from L2.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

import triton
import triton.language as tl

from lolcats.ops.hybrid.kernels.tiles import LOG2E, add_softmax, load_tile, store_tile, store_vector
from lolcats.ops.near.kernels.tiles import (
    SIZES,
    capped,
    filled_slots,
    held_code,
    load_keys,
    read_text,
    row_begin,
    row_limits,
    slot_keys,
    slots_visible,
    window_visible,
)


@triton.jit(do_not_specialize=SIZES)
def near_forward(
    q,
    k,
    v,
    before,
    until,
    lengths,
    start,
    held_k,
    held_v,
    sink_logits,
    sink_q,
    sizes,
    out,
    lse,
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
    blocks,
    window,
    pairs,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    DV: tl.constexpr,
    BV: tl.constexpr,
    SINKS: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEARNED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_SINK_Q: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (HEADS, ROWS of queries, batch). ROWS divides C.

    With HAS_SIZES, `sizes` [KV, 2] are window and kept pairs of each key head, `window` and `pairs` the most of each.
    """
    head = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    batch = tl.program_id(2).to(tl.int64)
    count, offset = read_text(lengths, start, batch, tokens, HAS_LENGTHS, HAS_STATE)
    kv_row = batch * (HEADS // GROUP) + head // GROUP
    ring, own_pairs = window, pairs
    if HAS_SIZES:
        window = tl.load(sizes + head // GROUP * 2)
        own_pairs = tl.load(sizes + head // GROUP * 2 + 1)
    begin = first // C * C
    query = first + tl.arange(0, ROWS)
    k += batch * k_b + (head // GROUP) * k_h
    v += batch * v_b + (head // GROUP) * v_h
    held_k += kv_row * (ring + pairs + SINKS) * D
    held_v += kv_row * (ring + pairs + SINKS) * DV
    before += (kv_row * blocks + begin // C) * pairs
    until += kv_row * (pairs + tokens)
    q_tile = load_tile(q + batch * q_b + head * q_h, q_n, first, count, 0, ROWS, D, BD)
    sink_tile = q_tile
    if HAS_SINK_Q:
        sink_tile = load_tile(sink_q + batch * q_b + head * q_h, q_n, first, count, 0, ROWS, D, BD)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    denominator = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BV), tl.float32)
    if LEARNED:
        top = tl.zeros((ROWS,), tl.float32) + tl.load(sink_logits + head).to(tl.float32) * LOG2E
        denominator += 1.0
    alive = first < count  # a block of padding reads nothing

    filled = tl.where(alive, filled_slots(begin, window, own_pairs, SINKS, HAS_PAIRS, HAS_STATE), 0)
    for slot0 in tl.range(0, filled, KEYS, num_stages=STAGES):
        slot = slot0 + tl.arange(0, KEYS)
        code, since, limit = slot_keys(
            before, until, slot, offset, count, window, pairs, ring, SINKS, HAS_PAIRS, HAS_STATE
        )
        k_tile = load_keys(k, k_n, held_k, code, count, D, BD, HAS_STATE)
        v_tile = load_keys(v, v_n, held_v, code, count, DV, BV, HAS_STATE)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if HAS_SINK_Q:
            own = tl.dot(sink_tile, tl.trans(k_tile), input_precision=PRECISION)
            products = tl.where((slot < SINKS)[None, :], own, products)
        s = capped(products, scale, SOFTCAP)
        visible = slots_visible(query[:, None], since[None, :], limit[None, :], count)
        s = tl.where(visible, s, -float("inf"))
        top, denominator, acc = add_softmax(top, denominator, acc, s, v_tile, PRECISION)

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
        s = capped(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, SOFTCAP)
        visible = window_visible(
            query[:, None], token[None, :], limit[None, :], offset, count, window, SINKS, HAS_PAIRS
        )  # fmt: skip
        s = tl.where(visible, s, -float("inf"))
        top, denominator, acc = add_softmax(top, denominator, acc, s, v_tile, PRECISION)

    real = (query < count) & (denominator > 0)
    r = tl.where(real, 1.0 / tl.where(real, denominator, 1.0), 0.0)
    store_tile(out + batch * o_b + head * o_h, o_n, first, tokens, 0, acc * r[:, None], ROWS, DV, BV)
    if SAVE:
        logarithm = tl.where(real, top + tl.log2(tl.where(real, denominator, 1.0)), float("inf"))
        store_vector(lse + (batch * HEADS + head) * tokens, first, tokens, logarithm, ROWS)
