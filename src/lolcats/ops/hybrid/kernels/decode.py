"""One decoding step in place: the new token enters the ring, a full block of keys the linear state; the output.

Algorithm, for a text and a key head (a program):
1. softmax of the group's query heads over sinks and window, block of tokens by block, with a running row maximum; the
   new token stands in the slot that it will take;
2. for each state of the key head: the state is read; where a block of E keys that left the window is complete, their
   features times value^T are added and it is written back; it is multiplied by the features of the queries that use it.
   Keys that left a sliding window and wait for their block are answered by the products of features;
3. the new token is written to its slot, that of the oldest key, when all has been read.
Which slots are filled, and whether a block is complete, follows from the length of the text: texts of a batch differ.
`advance_kernel` counts the token afterwards: all programs of a text read the length. With `indices` the states are a
pool of P, of which text b has row indices[b], or none (-1). The rows of a tensor may lie apart, as in the pages of a
serving engine.

Shapes: q, out [B, H, D or Dv]; ring [P, KV, R, .], R = W + E - 1 slots (2 W when terraced); kv [P, S, F, Dv] fp32;
k_sum [P, S, F] fp32; maps [heads, D, width]; P = B without indices.
Bytes: states once read and in one of E steps (W when terraced) written, rings once read, in the mean
4 S F Dv (1 + 1 / E) + 2 KV (W + E / 2) (D + Dv) a text in bfloat16; maps from L2.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats.ops.hybrid.kernels.launch import KINDS, SMALLEST, either, on, padded, precision
from lolcats.ops.hybrid.kernels.tiles import (
    HEDGEHOG,
    LOG2E,
    add_softmax,
    cap,
    hedgehog_halves,
    load_bias,
    load_matrix,
    load_tile,
    map_features,
    map_part,
    store_matrix,
    store_tile,
)
from lolcats.ops.maps import MapWeights
from lolcats.ops.types import HybridSpec, HybridState

LARGEST_TILE = 128 * 128
"""Numbers of a tile (of a ring, or of a part of a state) that a program holds in registers."""


@triton.jit
def vector_features(
    x, weight, bias, scale, D: tl.constexpr, BD: tl.constexpr, WIDTH: tl.constexpr, BF: tl.constexpr, MAP: tl.constexpr
):
    """scale phi(x) of one token x [BD] in fp32, as a tuple of parts [1, BF]."""
    w = load_matrix(weight, D, BD, WIDTH, WIDTH, 0, BF).to(tl.float32)
    y = tl.sum(w * x[:, None], 0)[None, :]
    if MAP == HEDGEHOG:
        phi = hedgehog_halves(y, scale, WIDTH, BF)
    else:
        phi = (tl.maximum(y + bias[None, :], 0.0) * scale,)
    return phi


@triton.jit
def state_row(active, indices, batch, HAS_ACTIVE: tl.constexpr, HAS_INDICES: tl.constexpr):
    """Row of a text's state (int64), and whether there is a token for it: 1 or 0."""
    row = batch
    if HAS_INDICES:
        row = tl.load(indices + batch).to(tl.int64)
    alive = (row >= 0).to(tl.int32)
    if HAS_ACTIVE:
        alive = tl.where(tl.load(active + batch).to(tl.int32) != 0, alive, 0)
    return row, alive


@triton.jit
def near_tokens(now, first, WINDOW: tl.constexpr, TERRACED: tl.constexpr, RING: tl.constexpr, BR: tl.constexpr):
    """Positions of the tokens from `now` - `first` backwards, their slots, and which of them are in the window."""
    position = now - first - tl.arange(0, BR)
    if TERRACED:
        inside = (position >= 0) & (now // WINDOW - position // WINDOW <= 1)
    else:
        inside = (position >= 0) & (now - position < WINDOW)
    return position, tl.where(inside, position % RING, 0), inside


@triton.jit
def left_tokens(now, WINDOW: tl.constexpr, TERRACED: tl.constexpr, FOLD: tl.constexpr):
    """How many tokens are in the sums before `now`, and how many have left the window beyond them: at most FOLD."""
    if TERRACED:
        summed = tl.maximum((now - 1) // WINDOW - 1, 0) * WINDOW
        pending = tl.where((now % WINDOW == 0) & (now >= 2 * WINDOW), WINDOW, 0)
    else:
        summed = tl.maximum(now - WINDOW, 0) // FOLD * FOLD
        pending = tl.maximum(now - WINDOW + 1, 0) - summed
    return summed, pending


@triton.jit
def load_slots(base, slot, there, size: tl.constexpr, block: tl.constexpr):
    """Rows of a ring [R, size] as [slots, block]; zero where `there` is not, and beyond `size`."""
    column = tl.arange(0, block)
    mask = there[:, None] & (column < size)[None, :]
    return tl.load(base + slot[:, None] * size + column[None, :], mask=mask, other=0.0)


@triton.jit
def left_block(first, summed, pending, RING: tl.constexpr, BW: tl.constexpr):
    """Of the keys that left, those from `first` on: positions, slots, and which of them there are."""
    index = first + tl.arange(0, BW)
    there = index < pending
    return summed + index, tl.where(there, (summed + index) % RING, 0), there


@triton.jit
def near_loss(
    losses, now, NEAR: tl.constexpr, WINDOW: tl.constexpr, TERRACED: tl.constexpr, RING: tl.constexpr, BR: tl.constexpr
):
    """Log decay of the tokens in the window before `now`."""
    total = 0.0
    for first in range(0, NEAR, BR):
        position, slot, inside = near_tokens(now, first, WINDOW, TERRACED, RING, BR)
        total += tl.sum(tl.load(losses + slot, mask=inside & (position < now), other=0.0), 0)
    return total


@triton.jit
def left_loss(losses, summed, pending, FOLD: tl.constexpr, RING: tl.constexpr, BW: tl.constexpr):
    """Log decay of the keys that left."""
    total = 0.0
    for first in range(0, FOLD, BW):
        _, slot, there = left_block(first, summed, pending, RING, BW)
        total += tl.sum(tl.load(losses + slot, mask=there, other=0.0), 0)
    return total


@triton.jit
def left_weights(
    losses, position, there, later, last, SINKS: tl.constexpr, RING: tl.constexpr, HAS_DECAY: tl.constexpr
):
    """Weights [BW] of keys that left: 0 for sinks, else their decay up to the last one; and `later` for those before.

    later: log decay of the tokens behind the one that follows them, up to `last`.
    """
    weight = tl.where(there & (position >= SINKS), 1.0, 0.0)
    if HAS_DECAY:
        following = tl.load(losses + (position + 1) % RING, mask=there & (position < last), other=0.0)
        weight *= tl.exp(later + tl.cumsum(following, 0, reverse=True))
        later += tl.sum(following, 0)
    return weight, later


@triton.jit
def decode_kernel(
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
    new_decay,
    active,
    indices,
    length,
    ring_k,
    ring_v,
    ring_decay,
    sink_k,
    sink_v,
    kv,
    k_sum,
    out,
    q_b,
    q_h,
    k_b,
    k_h,
    v_b,
    v_h,
    length_row,
    ring_k_row,
    ring_v_row,
    ring_decay_row,
    sink_k_row,
    sink_v_row,
    kv_row,
    k_sum_row,
    scale,
    KV_HEADS: tl.constexpr,
    KV_GROUP: tl.constexpr,
    STATES: tl.constexpr,
    BG: tl.constexpr,
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
    RING: tl.constexpr,
    BR: tl.constexpr,
    FOLD: tl.constexpr,
    BW: tl.constexpr,
    SINKS: tl.constexpr,
    BS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEARNED: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    HAS_INDICES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (batch, key heads)."""
    batch = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    text, alive = state_row(active, indices, batch, HAS_ACTIVE, HAS_INDICES)
    if alive == 0:
        return
    now = tl.load(length + text * length_row).to(tl.int32)
    own = now % RING  # slot of the new token, so far of the oldest key
    NEAR: tl.constexpr = 2 * WINDOW if TERRACED else WINDOW
    WAITS: tl.constexpr = (FOLD > 1) and not TERRACED
    dtype = v.dtype.element_ty
    HEADS: tl.constexpr = KV_HEADS * KV_GROUP
    PARTS: tl.constexpr = 2 if MAP == HEDGEHOG else 1

    # 1. the softmax half
    d = tl.arange(0, BD)
    column = tl.arange(0, BV)
    g = tl.arange(0, BG)
    ring_k += text * ring_k_row + kv_head * RING * D
    ring_v += text * ring_v_row + kv_head * RING * DV
    k_new = tl.load(k + batch * k_b + kv_head * k_h + d, mask=d < D, other=0.0)
    v_new = tl.load(v + batch * v_b + kv_head * v_h + column, mask=column < DV, other=0.0)
    q_rows = q + batch * q_b + kv_head * KV_GROUP * q_h
    q_tile = load_tile(q_rows, q_h, 0, KV_GROUP, 0, BG, D, BD)
    top = tl.full((BG,), -float("inf"), tl.float32)
    denominator = tl.zeros((BG,), tl.float32)
    acc = tl.zeros((BG, BV), tl.float32)
    if LEARNED:
        top = tl.load(sink_logits + kv_head * KV_GROUP + g, mask=g < KV_GROUP, other=0.0).to(tl.float32) * LOG2E
        denominator += 1.0
    if SINKS > 0:
        sink = tl.arange(0, BS)
        sink_k += text * sink_k_row + kv_head * SINKS * D
        sink_v += text * sink_v_row + kv_head * SINKS * DV
        here = (sink == now)[:, None]
        sk = tl.where(here, k_new[None, :], load_tile(sink_k, D, 0, SINKS, 0, BS, D, BD).to(dtype))
        sv = tl.where(here, v_new[None, :], load_tile(sink_v, DV, 0, SINKS, 0, BS, DV, BV).to(dtype))
        tl.store(sink_k + now * D + d, k_new, mask=d < tl.where(now < SINKS, D, 0))
        tl.store(sink_v + now * DV + column, v_new, mask=column < tl.where(now < SINKS, DV, 0))
        sink_scores = cap(tl.dot(q_tile, tl.trans(sk), input_precision=PRECISION) * scale, SOFTCAP) * LOG2E
        sink_scores = tl.where(((sink <= now) & (sink < SINKS))[None, :], sink_scores, -float("inf"))
        top, denominator, acc = add_softmax(top, denominator, acc, sink_scores, sv, PRECISION)
    for first in range(0, NEAR, BR):
        position, slot, inside = near_tokens(now, first, WINDOW, TERRACED, RING, BR)
        newest = (position == now)[:, None]
        stored = inside & (position < now)
        keys = tl.where(newest, k_new[None, :], load_slots(ring_k, slot, stored, D, BD).to(dtype))
        values = tl.where(newest, v_new[None, :], load_slots(ring_v, slot, stored, DV, BV).to(dtype))
        s = cap(tl.dot(q_tile, tl.trans(keys), input_precision=PRECISION) * scale, SOFTCAP) * LOG2E
        s = tl.where((inside & (position >= SINKS))[None, :], s, -float("inf"))
        top, denominator, acc = add_softmax(top, denominator, acc, s, values, PRECISION)
    gate = tl.load(window_factor + kv_head * KV_GROUP + g, mask=g < KV_GROUP, other=0.0).to(tl.float32)
    gate = tl.sigmoid(gate)
    denominator *= gate
    acc *= gate[:, None]

    # 2. the linear half
    summed, pending = left_tokens(now, WINDOW, TERRACED, FOLD)
    complete = pending == FOLD
    last = summed + pending - 1
    if WAITS:
        left, place, waits = left_block(0, summed, tl.where(complete, 0, pending), RING, BW)
        k_left = load_slots(ring_k, place, waits, D, BD).to(dtype)
        v_left = load_slots(ring_v, place, waits, DV, BV).to(tl.float32)
    f = tl.arange(0, BF)
    USERS: tl.constexpr = KV_GROUP // STATES
    for state in range(STATES):
        state_head = kv_head * STATES + state
        w_at = map_k + state_head * D * WIDTH
        b_k = load_bias(bias_k + state_head * WIDTH, WIDTH, BF, MAP)
        losses = ring_decay + text * ring_decay_row + state_head * RING
        passed = 0.0  # log decay in the window
        gone = 0.0  # and before it, since the last key in the sums
        if HAS_DECAY:
            new_loss = tl.load(new_decay + batch * (KV_HEADS * STATES) + state_head)
            passed = new_loss + near_loss(losses, now, NEAR, WINDOW, TERRACED, RING, BR)
            gone = left_loss(losses, summed, pending, FOLD, RING, BW)
        fade = tl.exp(gone)
        tiles = ()
        sums = ()
        for i in tl.static_range(PARTS):
            to = kv + text * kv_row + (state_head * F + i * WIDTH) * DV
            sums_at = k_sum + text * k_sum_row + state_head * F + i * WIDTH + f
            tile = load_matrix(to, WIDTH, BF, DV, DV, 0, BV) * fade
            total = tl.load(sums_at, mask=f < WIDTH, other=0.0) * fade
            if complete:
                w_k = load_matrix(w_at, D, BD, WIDTH, WIDTH, 0, BF).to(dtype)
                later = 0.0
                for step in range(0, FOLD, BW):  # the last keys first
                    first = (FOLD - 1) // BW * BW - step
                    key, place, there = left_block(first, summed, pending, RING, BW)
                    weight, later = left_weights(losses, key, there, later, last, SINKS, RING, HAS_DECAY)
                    k_tile = load_slots(ring_k, place, there, D, BD).to(dtype)
                    v_tile = load_slots(ring_v, place, there, DV, BV).to(dtype)
                    phi = map_part(k_tile, w_k, b_k, 1.0, 1.0 - 2.0 * i, WIDTH, BF, MAP, PRECISION) * weight[:, None]
                    total += tl.sum(phi, 0)
                    high = phi.to(dtype)
                    tile = tl.dot(tl.trans(high), v_tile, tile, input_precision=PRECISION)
                    if dtype != tl.float32:  # the rest: what is rounded away in all steps alike adds up
                        rest = (phi - high.to(tl.float32)).to(dtype)
                        tile = tl.dot(tl.trans(rest), v_tile, tile, input_precision=PRECISION)
                store_matrix(to, tile, WIDTH, BF, DV, DV, 0, BV)
                tl.store(sums_at, total, mask=f < WIDTH)
            tiles = tiles + (tile,)
            sums = sums + (total,)
        if WAITS:
            w_wait = load_matrix(w_at, D, BD, WIDTH, WIDTH, 0, BF).to(dtype)
            phi_k = map_features(k_left, w_wait, b_k, 1.0, WIDTH, BF, MAP, PRECISION)
            waiting = left_weights(losses, left, waits, 0.0, last, SINKS, RING, HAS_DECAY)[0]
        if HAS_DECAY:
            tl.debug_barrier()  # all is read before the new token is written
            tl.store(losses + own, new_loss)
        for user in range(USERS):
            row = state * USERS + user
            head = kv_head * KV_GROUP + row
            phi_scale = tl.exp(passed)
            if HAS_FACTOR:
                phi_scale = phi_scale * tl.exp(tl.load(factor + head).to(tl.float32))
            x = tl.load(q_rows + row * q_h + d, mask=d < D, other=0.0).to(tl.float32)
            b_q = load_bias(bias_q + head * WIDTH, WIDTH, BF, MAP)
            phi_q = vector_features(x, map_q + head * D * WIDTH, b_q, phi_scale, D, BD, WIDTH, BF, MAP)
            mine = g == row
            for i in tl.static_range(PARTS):
                part = tl.sum(phi_q[i], 0)
                acc += tl.where(mine[:, None], tl.sum(part[:, None] * tiles[i], 0)[None, :], 0.0)
                denominator += tl.where(mine, tl.sum(part * sums[i], 0), 0.0)
                if WAITS:
                    weight = tl.sum(part[None, :] * phi_k[i], 1) * waiting
                    acc += tl.where(mine[:, None], tl.sum(weight[:, None] * v_left, 0)[None, :], 0.0)
                    denominator += tl.where(mine, tl.sum(weight, 0), 0.0)

    # 3. the output, and the new token
    r = tl.where(denominator != 0, 1.0 / tl.where(denominator != 0, denominator, 1.0), 0.0)
    store_tile(out + (batch * HEADS + kv_head * KV_GROUP) * DV, DV, 0, KV_GROUP, 0, acc * r[:, None], BG, DV, BV)
    tl.debug_barrier()  # all is read before the new token is written
    tl.store(ring_k + own * D + d, k_new, mask=d < D)
    tl.store(ring_v + own * DV + column, v_new, mask=column < DV)


@triton.jit
def advance_kernel(length, active, indices, length_row, HAS_ACTIVE: tl.constexpr, HAS_INDICES: tl.constexpr):
    """Grid: (batch,). One token more."""
    text, alive = state_row(active, indices, tl.program_id(0).to(tl.int64), HAS_ACTIVE, HAS_INDICES)
    if alive != 0:
        own = length + text * length_row
        tl.store(own, tl.load(own) + 1)


def step_refusal(q: Tensor, v: Tensor, maps: MapWeights, spec: HybridSpec) -> str | None:
    """Why `decode_step` does not take a call, or None: it takes sizes whose tiles fit into registers."""
    if spec.window == 0:
        return "it needs a window of at least 1"
    if q.dtype != v.dtype or q.dtype == torch.float64:
        return f"it takes queries and values of one dtype, not float64; got {q.dtype} and {v.dtype}"
    size = max(padded(q.shape[3]), padded(v.shape[3]))
    tile, rows = padded(maps.q.shape[2]) * size, rows_of_a_tile(size)
    if tile > LARGEST_TILE:
        return (
            f"its tiles hold {LARGEST_TILE} numbers, map columns times head size; got {tile} (columns "
            f"{maps.q.shape[2]}, D {q.shape[3]}, Dv {v.shape[3]})"
        )
    if spec.window_kind == "sliding" and spec.fold > rows:
        return f"of these sizes up to {rows} keys may wait; got fold {spec.fold}"
    return None


def rows_of_a_tile(size: int) -> int:
    """Rows of a tile of keys or values, of which each has `size` numbers with padding."""
    return min(128, LARGEST_TILE // size)


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: MapWeights,
    window_factor: Tensor,
    state: HybridState,
    spec: HybridSpec,
    log_decay: Tensor | None = None,
    active: Tensor | None = None,
    sink_logits: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`hybrid_step` with contiguous rows in `state`, which are changed in place; returns the output [B, H, 1, Dv].

    Args: as there; the state's linear half has one state per map of the keys (a query head with decay).
    """
    batch, heads, _, size = q.shape
    kv_heads, dv, width = k.shape[1], v.shape[3], maps.q.shape[2]
    window, sinks = state.window, state.sinks
    map_k, bias_k = maps.k, maps.bias_k
    state_heads = state.linear.kv.shape[1]
    if map_k.shape[0] != state_heads:  # decay: one state per query head
        map_k = map_k.repeat_interleave(state_heads // map_k.shape[0], 0)
        bias_k = None if bias_k is None else bias_k.repeat_interleave(state_heads // bias_k.shape[0], 0)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    make = torch.empty if active is None and state_indices is None else torch.zeros
    out = make(batch, heads, 1, dv, dtype=v.dtype, device=v.device)
    decay = None if log_decay is None else log_decay.float().contiguous()
    # `active` is often a column of a wide mask.
    active, indices = (None if x is None else x.contiguous() for x in (active, state_indices))
    flags = {"HAS_ACTIVE": active is not None, "HAS_INDICES": indices is not None}
    features = state.linear.kv.shape[2]
    parts = state.length, window.k, window.v, either(window.log_decay, q), *((q, q) if sinks is None else sinks)
    rows = rows_of_a_tile(max(padded(size), padded(dv)))
    near = spec.window * (2 if spec.window_kind == "terraced" else 1)
    on(decode_kernel, (batch, kv_heads))(
        q, k, v, maps.q.contiguous(), map_k.contiguous(), either(maps.bias_q, q), either(bias_k, q),
        either(maps.log_scale, q), window_factor, either(sink_logits, q), either(decay, q), either(active, q),
        either(indices, q), *parts, *state.linear, out,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        *(x.stride(0) for x in (*parts, *state.linear)), spec.score_scale(size),
        KV_HEADS=kv_heads, KV_GROUP=heads // kv_heads, STATES=state_heads // kv_heads,
        BG=padded(heads // kv_heads), D=size, BD=max(SMALLEST, padded(size)), WIDTH=width, F=features,
        BF=max(SMALLEST, padded(width)), DV=dv, BV=max(SMALLEST, padded(dv)), MAP=KINDS[maps.kind],
        WINDOW=spec.window, TERRACED=spec.window_kind == "terraced", RING=spec.slots,
        BR=min(rows, padded(near)), FOLD=spec.block, BW=min(rows, max(SMALLEST, padded(spec.block))),
        SINKS=spec.sinks, BS=padded(spec.sinks), SOFTCAP=float(spec.softcap or 0.0),
        LEARNED=sink_logits is not None, HAS_FACTOR=maps.log_scale is not None, HAS_DECAY=decay is not None,
        PRECISION=precision(v.dtype), **flags, num_warps=4, num_stages=1,
    )  # fmt: skip
    on(advance_kernel, (batch,))(
        state.length, either(active, q), either(indices, q), state.length.stride(0), **flags, num_warps=1
    )
    return out
