"""One decoding step in place: the oldest pair may enter the kept ones, the new token enters the ring, the output.

Algorithm, for a text and a key head (a program):
1. the lowest kept score, and whether the pair that leaves the ring takes its place;
2. softmax of the group's query heads over sinks, kept pairs and ring, tile by tile with a running row maximum; whatever
   enters stands already in the slot that it will take;
3. what has entered is written, when all has been read.
Which slots are filled follows from the length of the text and, of kept pairs, from their scores. `advance_kernel`
counts the token afterwards: all programs of a text read the length. With `indices` the states are a pool of which
text b has row indices[b], or none (-1).

Shapes: q, out [B, H, D or Dv]; ring [rows, KV, w, .], kept [rows, KV, P, .], sinks [rows, KV, s, .].
Bytes: the state once read, KV (w + P + s) (D + Dv) numbers a text.
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

from lolcats.ops.hybrid.kernels.decode import advance_kernel, ring_positions, state_row
from lolcats.ops.hybrid.kernels.launch import SMALLEST, either, on, padded, precision
from lolcats.ops.hybrid.kernels.tiles import LOG2E, add_softmax, load_tile, store_tile
from lolcats.ops.near.kernels.launch import device_of, refusal
from lolcats.ops.near.kernels.tiles import capped
from lolcats.ops.near.types import NearSpec, NearState

LARGEST_PAIRS = 4096
"""Scores of kept pairs that a program holds in registers."""
KEYS = 64
"""Slots of a tile."""


@triton.jit
def load_slots(
    base, first, count, entering, new, size: tl.constexpr, block: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Slots from `first` on of [count, size] as a tile, and `new` [block] where `entering` [K]."""
    tile = load_tile(base, size, first, count, 0, K, size, block).to(new.dtype)
    return tl.where(entering[:, None], new[None, :], tile)


@triton.jit
def near_decode(
    q, k, v, score, sink_logits, active, indices, length,
    ring_k, ring_v, ring_score, kept_k, kept_v, kept_score, sink_k, sink_v, out,
    q_b, q_h, k_b, k_h, v_b, v_h, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, BS: tl.constexpr, PAIRS: tl.constexpr, BP: tl.constexpr,
    SOFTCAP: tl.constexpr, LEARNED: tl.constexpr, HAS_ACTIVE: tl.constexpr, HAS_INDICES: tl.constexpr,
    PRECISION: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (batch, key heads)."""
    batch = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    text, alive = state_row(active, indices, batch, HAS_ACTIVE, HAS_INDICES)
    if alive == 0:
        return
    now = tl.load(length + text).to(tl.int32)
    own = now % WINDOW  # slot of the new token, so far of the oldest
    dtype = v.dtype.element_ty
    pair = text * KV_HEADS + kv_head
    d = tl.arange(0, BD)
    column = tl.arange(0, BV)
    g = tl.arange(0, BG)
    ring_k += pair * WINDOW * D
    ring_v += pair * WINDOW * DV
    k_new = tl.load(k + batch * k_b + kv_head * k_h + d, mask=d < D, other=0.0).to(dtype)
    v_new = tl.load(v + batch * v_b + kv_head * v_h + column, mask=column < DV, other=0.0)
    q_tile = load_tile(q + batch * q_b + kv_head * GROUP * q_h, q_h, 0, GROUP, 0, BG, D, BD)
    top = tl.full((BG,), -float("inf"), tl.float32)
    denominator = tl.zeros((BG,), tl.float32)
    acc = tl.zeros((BG, BV), tl.float32)
    if LEARNED:
        top = tl.load(sink_logits + kv_head * GROUP + g, mask=g < GROUP, other=0.0).to(tl.float32) * LOG2E
        denominator += 1.0
    if SINKS > 0:
        sink = tl.arange(0, BS)
        sink_k += pair * SINKS * D
        sink_v += pair * SINKS * DV
        sk = load_slots(sink_k, 0, SINKS, sink == now, k_new, D, BD, BS)
        sv = load_slots(sink_v, 0, SINKS, sink == now, v_new, DV, BV, BS)
        sink_scores = capped(tl.dot(q_tile, tl.trans(sk), input_precision=PRECISION), scale, SOFTCAP)
        sink_scores = tl.where(((sink <= now) & (sink < SINKS))[None, :], sink_scores, -float("inf"))
        top, denominator, acc = add_softmax(top, denominator, acc, sink_scores, sv, PRECISION)
    if PAIRS > 0:
        kept_k += pair * PAIRS * D
        kept_v += pair * PAIRS * DV
        kept_score += pair * PAIRS
        ring_score += pair * WINDOW
        place = tl.arange(0, BP)
        marks = tl.load(kept_score + place, mask=place < PAIRS, other=float("inf"))
        lowest = tl.min(marks, 0)
        left = tl.load(ring_score + own)
        enters = (now - WINDOW >= SINKS) & (left > lowest)
        worst = tl.min(tl.where(marks == lowest, place, BP), 0)
        k_left = tl.load(ring_k + own * D + d, mask=d < D, other=0.0).to(dtype)
        v_left = tl.load(ring_v + own * DV + column, mask=column < DV, other=0.0).to(dtype)
        for first in tl.range(0, PAIRS, K, num_stages=STAGES):
            slot = first + tl.arange(0, K)
            entering = (slot == worst) & enters
            mark = tl.load(kept_score + slot, mask=slot < PAIRS, other=-float("inf"))
            keys = load_slots(kept_k, first, PAIRS, entering, k_left, D, BD, K)
            values = load_slots(kept_v, first, PAIRS, entering, v_left, DV, BV, K)
            s = capped(tl.dot(q_tile, tl.trans(keys), input_precision=PRECISION), scale, SOFTCAP)
            s = tl.where(((mark > -float("inf")) | entering)[None, :], s, -float("inf"))
            top, denominator, acc = add_softmax(top, denominator, acc, s, values, PRECISION)
    for first in tl.range(0, WINDOW, K, num_stages=STAGES):
        slot = first + tl.arange(0, K)
        position, inside = ring_positions(now, slot, WINDOW, False, WINDOW)
        keys = load_slots(ring_k, first, WINDOW, slot == own, k_new, D, BD, K)
        values = load_slots(ring_v, first, WINDOW, slot == own, v_new, DV, BV, K)
        s = capped(tl.dot(q_tile, tl.trans(keys), input_precision=PRECISION), scale, SOFTCAP)
        s = tl.where((inside & (position >= SINKS))[None, :], s, -float("inf"))
        top, denominator, acc = add_softmax(top, denominator, acc, s, values, PRECISION)
    to = out + (batch * KV_HEADS + kv_head) * GROUP * DV
    store_tile(to, DV, 0, GROUP, 0, acc / denominator[:, None], BG, DV, BV)

    tl.debug_barrier()  # all is read before anything is written
    tl.store(ring_k + own * D + d, k_new, mask=d < D)
    tl.store(ring_v + own * DV + column, v_new, mask=column < DV)
    if SINKS > 0:
        tl.store(sink_k + now * D + d, k_new, mask=d < tl.where(now < SINKS, D, 0))
        tl.store(sink_v + now * DV + column, v_new, mask=column < tl.where(now < SINKS, DV, 0))
    if PAIRS > 0:
        tl.store(ring_score + own, tl.load(score + batch * KV_HEADS + kv_head))
        tl.store(kept_k + worst * D + d, k_left, mask=d < tl.where(enters, D, 0))
        tl.store(kept_v + worst * DV + column, v_left, mask=column < tl.where(enters, DV, 0))
        tl.store(kept_score + worst, left, mask=enters)


def step_refusal(
    q: Tensor, k: Tensor, v: Tensor, state: NearState, in_pool: bool, sink_logits: Tensor | None
) -> str | None:
    """Why `decode_step` does not take a call, or None."""
    if (reason := refusal(q, k, v, False, sink_logits)) is not None:
        return reason
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, sink_logits) if x is not None):
        return "it gives no gradients; decode under torch.no_grad()"
    if q.dtype != v.dtype:
        return f"it takes queries and values of one dtype; got {q.dtype} and {v.dtype}"
    if state.kept is not None:
        if state.kept.score.dtype != torch.float32:
            return f"it takes scores of float32 in the state; got {state.kept.score.dtype}"
        if state.kept.score.shape[2] > LARGEST_PAIRS:
            return f"it takes up to {LARGEST_PAIRS} kept pairs; got {state.kept.score.shape[2]}"
    if in_pool and not all(t.is_contiguous() for t in state.tensors()):
        return "it needs a pool of contiguous tensors"
    return None


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: NearState,
    spec: NearSpec,
    score: Tensor | None = None,
    active: Tensor | None = None,
    sink_logits: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`near_step` with contiguous tensors in `state`, which are changed in place; returns the output [B, H, 1, Dv]."""
    (batch, heads, _, size), kv_heads, dv = q.shape, k.shape[1], v.shape[3]
    ring, sinks, kept = state.ring, state.sinks, state.kept
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    make = torch.empty if active is None and state_indices is None else torch.zeros
    out = make(batch, heads, 1, dv, dtype=v.dtype, device=v.device)
    score = None if score is None else score.float().contiguous()
    # `active` is often a column of a wide mask.
    active, indices = (None if x is None else x.contiguous() for x in (active, state_indices))
    flags = {"HAS_ACTIVE": active is not None, "HAS_INDICES": indices is not None}
    with device_of(v):
        on(near_decode, (batch, kv_heads))(
            q, k, v, either(score, q), either(sink_logits, q), either(active, q), either(indices, q), state.length,
            ring.k, ring.v, either(ring.score, q), *(kept or (q, q, q)), *(sinks or (q, q)), out,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), spec.product_scale(size),
            KV_HEADS=kv_heads, GROUP=heads // kv_heads, BG=padded(heads // kv_heads), D=size,
            BD=max(SMALLEST, padded(size)), DV=dv, BV=max(SMALLEST, padded(dv)), WINDOW=spec.window,
            SINKS=spec.sinks, BS=padded(spec.sinks), PAIRS=spec.pairs, BP=padded(spec.pairs),
            SOFTCAP=float(spec.softcap or 0.0), LEARNED=sink_logits is not None, **flags,
            PRECISION=precision(v.dtype), K=KEYS, STAGES=3 if v.element_size() == 2 else 1, num_warps=4,
        )  # fmt: skip
        on(advance_kernel, (batch,))(state.length, either(active, q), either(indices, q), **flags, num_warps=1)
    return out
