"""One decoding step in place: the new token enters the ring, the oldest key enters the linear state, the output.

Algorithm, for a batch entry and a key head (a program):
1. the ring is read from its second slot on, with the new token after it, and written back one slot earlier;
2. scores of the group's query heads against ring and sinks, their row maximum, softmax half of the output;
3. for each state of the key head: features of the keys that left, state plus features value^T read, written back,
   and multiplied by the features of the queries that use it. From a sliding window one key leaves in each step, from a
   terraced one a whole block of W at the start of a block.
Which slots are filled follows from the length of the text. `advance_kernel` counts the token afterwards: all programs
of a batch entry read the length.

Shapes: q, out [B, H, D or Dv]; ring [B, KV, R, .], R = W slots (2 W when terraced); kv [B, S, F, Dv] fp32; k_sum
[B, S, F] fp32; maps [heads, D, width].
Bytes: state and ring once read and once written, 2 (4 S F Dv + 2 KV R (D + Dv)) B in bfloat16; the maps from L2.
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
    cap,
    hedgehog_halves,
    load_bias,
    load_matrix,
    load_tile,
    map_features,
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
def ring_positions(now, slot, WINDOW: tl.constexpr, TERRACED: tl.constexpr, RING: tl.constexpr):
    """Positions of the ring's slots when `now` is in the last one, and which of them are in the window."""
    position = now - (RING - 1 - slot)
    inside = (slot < RING) & (position >= 0)
    if TERRACED:
        inside = inside & (now // WINDOW - position // WINDOW <= 1)
    return position, inside


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
    BW: tl.constexpr,
    SINKS: tl.constexpr,
    BS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEARNED: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (batch, key heads)."""
    batch = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    alive = 1
    if HAS_ACTIVE:
        alive = tl.load(active + batch).to(tl.int32)
    if alive == 0:
        return
    now = tl.load(length + batch).to(tl.int32)
    dtype = v.dtype.element_ty
    pair = batch * KV_HEADS + kv_head
    HEADS: tl.constexpr = KV_HEADS * KV_GROUP
    PARTS: tl.constexpr = 2 if MAP == HEDGEHOG else 1

    # 1. the ring
    slot = tl.arange(0, BR)
    d = tl.arange(0, BD)
    column = tl.arange(0, BV)
    ring_k += pair * RING * D
    ring_v += pair * RING * DV
    k_new = tl.load(k + batch * k_b + kv_head * k_h + d, mask=d < D, other=0.0)
    v_new = tl.load(v + batch * v_b + kv_head * v_h + column, mask=column < DV, other=0.0)
    leaving = 0  # slots from the first on whose keys leave the window
    if TERRACED:
        leaving = tl.where((now % WINDOW == 0) & (now >= 2 * WINDOW), WINDOW, 0)
        k_left = load_tile(ring_k, D, 0, leaving, 0, BW, D, BD).to(dtype)
        v_left = load_tile(ring_v, DV, 0, leaving, 0, BW, DV, BV).to(dtype)
    else:
        k_left = tl.load(ring_k + d, mask=d < D, other=0.0).to(tl.float32)
        v_left = tl.load(ring_v + column, mask=column < DV, other=0.0).to(tl.float32)
    last = (slot == RING - 1)[:, None]
    keys = tl.where(last, k_new[None, :], load_tile(ring_k, D, 1, RING, 0, BR, D, BD).to(dtype))
    values = tl.where(last, v_new[None, :], load_tile(ring_v, DV, 1, RING, 0, BR, DV, BV).to(dtype))
    tl.debug_barrier()  # all is read before anything is written
    store_tile(ring_k, D, 0, RING, 0, keys, BR, D, BD)
    store_tile(ring_v, DV, 0, RING, 0, values, BR, DV, BV)

    # 2. the softmax half
    position, inside = ring_positions(now, slot, WINDOW, TERRACED, RING)
    g = tl.arange(0, BG)
    q_rows = q + batch * q_b + kv_head * KV_GROUP * q_h
    q_tile = load_tile(q_rows, q_h, 0, KV_GROUP, 0, BG, D, BD)
    s = cap(tl.dot(q_tile, tl.trans(keys), input_precision=PRECISION) * scale, SOFTCAP) * LOG2E
    s = tl.where((inside & (position >= SINKS))[None, :], s, -float("inf"))
    top = tl.max(s, 1)
    if SINKS > 0:
        sink = tl.arange(0, BS)
        sink_k += pair * SINKS * D
        sink_v += pair * SINKS * DV
        here = (sink == now)[:, None]
        sk = tl.where(here, k_new[None, :], load_tile(sink_k, D, 0, SINKS, 0, BS, D, BD).to(dtype))
        sv = tl.where(here, v_new[None, :], load_tile(sink_v, DV, 0, SINKS, 0, BS, DV, BV).to(dtype))
        tl.store(sink_k + now * D + d, k_new, mask=d < tl.where(now < SINKS, D, 0))
        tl.store(sink_v + now * DV + column, v_new, mask=column < tl.where(now < SINKS, DV, 0))
        sink_scores = cap(tl.dot(q_tile, tl.trans(sk), input_precision=PRECISION) * scale, SOFTCAP) * LOG2E
        sink_scores = tl.where(((sink <= now) & (sink < SINKS))[None, :], sink_scores, -float("inf"))
        top = tl.maximum(top, tl.max(sink_scores, 1))
    if LEARNED:
        learned = tl.load(sink_logits + kv_head * KV_GROUP + g, mask=g < KV_GROUP, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(top, learned)
    top = tl.where(top == -float("inf"), 0.0, top)
    gate = tl.load(window_factor + kv_head * KV_GROUP + g, mask=g < KV_GROUP, other=0.0).to(tl.float32)
    base = top - tl.log2(tl.sigmoid(gate))
    weights = tl.exp2(s - base[:, None])
    denominator = tl.sum(weights, 1)
    acc = tl.dot(weights.to(dtype), values, input_precision=PRECISION)
    if SINKS > 0:
        weights_s = tl.exp2(sink_scores - base[:, None])
        denominator += tl.sum(weights_s, 1)
        acc = tl.dot(weights_s.to(dtype), sv, acc, input_precision=PRECISION)
    if LEARNED:
        denominator += tl.exp2(learned - base)

    # 3. the linear half
    counted = tl.where(now - WINDOW >= SINKS, 1.0, 0.0)
    left = tl.arange(0, BW)
    f = tl.arange(0, BF)
    USERS: tl.constexpr = KV_GROUP // STATES
    for state in range(STATES):
        state_head = kv_head * STATES + state
        at = batch * (KV_HEADS * STATES) + state_head
        b_k = load_bias(bias_k + state_head * WIDTH, WIDTH, BF, MAP)
        weight = tl.where((left < leaving) & (now - RING + left >= SINKS), 1.0, 0.0)  # of the keys of a block that left
        fade = 1.0
        passed = 0.0
        if HAS_DECAY:
            losses = tl.load(ring_decay + at * RING + slot + 1, mask=slot < RING - 1, other=0.0)
            losses = tl.where(slot == RING - 1, tl.load(new_decay + at), losses)
            if TERRACED:
                gone = tl.load(ring_decay + at * RING + left, mask=left < leaving, other=0.0)
                fade = tl.exp(tl.sum(gone, 0))
                weight *= tl.exp(tl.sum(gone, 0) - tl.cumsum(gone, 0))
            else:
                fade = tl.where(now >= WINDOW, tl.exp(tl.load(ring_decay + at * RING)), 1.0)
            tl.debug_barrier()
            tl.store(ring_decay + at * RING + slot, losses, mask=slot < RING)
            passed = tl.sum(tl.where(inside, losses, 0.0), 0)
        if TERRACED:
            w_k = load_matrix(map_k + state_head * D * WIDTH, D, BD, WIDTH, WIDTH, 0, BF).to(dtype)
            phi_k = map_features(k_left, w_k, b_k, 1.0, WIDTH, BF, MAP, PRECISION)
        else:
            phi_k = vector_features(k_left, map_k + state_head * D * WIDTH, b_k, 1.0, D, BD, WIDTH, BF, MAP)
        tiles = ()
        sums = ()
        for i in tl.static_range(PARTS):
            to = kv + at * F * DV + i * WIDTH * DV
            tile = load_matrix(to, WIDTH, BF, DV, DV, 0, BV) * fade
            total = tl.load(k_sum + at * F + i * WIDTH + f, mask=f < WIDTH, other=0.0) * fade
            if TERRACED:
                weighted = phi_k[i] * weight[:, None]
                total += tl.sum(weighted, 0)
                tile = tl.dot(tl.trans(weighted.to(dtype)), v_left, tile, input_precision=PRECISION)
            else:
                part = tl.sum(phi_k[i], 0) * counted
                total += part
                tile += part[:, None] * v_left[None, :]
            store_matrix(to, tile, WIDTH, BF, DV, DV, 0, BV)
            tl.store(k_sum + at * F + i * WIDTH + f, total, mask=f < WIDTH)
            tiles = tiles + (tile,)
            sums = sums + (total,)
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

    r = tl.where(denominator != 0, 1.0 / tl.where(denominator != 0, denominator, 1.0), 0.0)
    store_tile(out + (batch * HEADS + kv_head * KV_GROUP) * DV, DV, 0, KV_GROUP, 0, acc * r[:, None], BG, DV, BV)


@triton.jit
def advance_kernel(
    length,
    position,
    active,
    WINDOW: tl.constexpr,
    TERRACED: tl.constexpr,
    RING: tl.constexpr,
    BR: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
):
    """Grid: (batch,). One token more, and the positions of the slots."""
    batch = tl.program_id(0).to(tl.int64)
    alive = 1
    if HAS_ACTIVE:
        alive = tl.load(active + batch).to(tl.int32)
    if alive == 0:
        return
    now = tl.load(length + batch)
    slot = tl.arange(0, BR)
    place, inside = ring_positions(now, slot, WINDOW, TERRACED, RING)
    tl.store(position + batch * RING + slot, tl.where(inside, place, -1), mask=slot < RING)
    tl.store(length + batch, now + 1)


def step_refusal(q: Tensor, v: Tensor, maps: MapWeights, spec: HybridSpec) -> str | None:
    """Why `decode_step` does not take a call, or None: it takes sizes whose tiles fit into registers."""
    if spec.window == 0:
        return "it needs a window of at least 1"
    if q.dtype != v.dtype or q.dtype == torch.float64:
        return f"it takes queries and values of one dtype, not float64; got {q.dtype} and {v.dtype}"
    ring = padded(spec.slots)
    size = max(padded(q.shape[3]), padded(v.shape[3]))
    tile = max(ring, padded(maps.q.shape[2])) * size
    if tile > LARGEST_TILE:
        return (
            f"its tiles hold {LARGEST_TILE} numbers, window slots or map columns times head size; got {tile} (window "
            f"{spec.window}, D {q.shape[3]}, Dv {v.shape[3]})"
        )
    return None


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
) -> tuple[Tensor, HybridState]:
    """`recurrent.hybrid_step` with the maps inside and the state changed in place (copied once if not contiguous).

    Args: as there; the state's linear half has one state per map of the keys (a query head with decay).
    """
    if any(not t.is_contiguous() for t in state.tensors()):
        state = state.map(lambda t: t.contiguous())
    batch, heads, _, size = q.shape
    kv_heads, dv, width = k.shape[1], v.shape[3], maps.q.shape[2]
    window, sinks = state.window, state.sinks
    map_k, bias_k = maps.k, maps.bias_k
    state_heads = state.linear.kv.shape[1]
    if map_k.shape[0] != state_heads:  # decay: one state per query head
        map_k = map_k.repeat_interleave(state_heads // map_k.shape[0], 0)
        bias_k = None if bias_k is None else bias_k.repeat_interleave(state_heads // bias_k.shape[0], 0)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    make = torch.empty if active is None else torch.zeros
    out = make(batch, heads, 1, dv, dtype=v.dtype, device=v.device)
    decay = None if log_decay is None else log_decay.float().contiguous()
    terraced = spec.window_kind == "terraced"
    slots = spec.slots
    if active is not None:  # often a column of a wide mask
        active = active.contiguous()
    flags = {"WINDOW": spec.window, "TERRACED": terraced, "RING": slots, "BR": padded(slots)}
    flags["HAS_ACTIVE"] = active is not None
    block, features = max(SMALLEST, padded(width)), state.linear.kv.shape[2]
    on(decode_kernel, (batch, kv_heads))(
        q, k, v, maps.q.contiguous(), map_k.contiguous(), either(maps.bias_q, q), either(bias_k, q),
        either(maps.log_scale, q), window_factor, either(sink_logits, q), either(decay, q), either(active, q),
        state.length, window.k, window.v, either(window.log_decay, q), *((q, q) if sinks is None else sinks),
        *state.linear, out, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        spec.score_scale(size), KV_HEADS=kv_heads, KV_GROUP=heads // kv_heads, STATES=state_heads // kv_heads,
        BG=padded(heads // kv_heads), D=size, BD=max(SMALLEST, padded(size)), WIDTH=width, F=features, BF=block, DV=dv,
        BV=max(SMALLEST, padded(dv)), MAP=KINDS[maps.kind], SINKS=spec.sinks, BS=padded(spec.sinks),
        SOFTCAP=float(spec.softcap or 0.0), LEARNED=sink_logits is not None, HAS_FACTOR=maps.log_scale is not None,
        BW=max(SMALLEST, padded(spec.window)), HAS_DECAY=decay is not None, PRECISION=precision(v.dtype),
        **flags, num_warps=4, num_stages=1,
    )  # fmt: skip
    on(advance_kernel, (batch,))(state.length, window.position, either(active, q), **flags, num_warps=1)
    return out, state
