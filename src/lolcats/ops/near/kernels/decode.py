"""One decoding step in place: the oldest pair may enter the kept ones, the new token enters the ring, the output.

Algorithm, for a text and a key head (a program):
1. the lowest kept score, and whether the pair that leaves the ring takes its place;
2. softmax of the group's query heads over sinks, kept pairs and ring, tile by tile with a running row maximum; whatever
   enters stands already in the slot that it will take;
3. what has entered is written, when all has been read.
Which slots are filled follows from the length of the text and, of kept pairs, from their scores. `advance_kernel`
counts the token afterwards: all programs of a text read the length. With `indices` the states are a pool of which
text b has row indices[b], or none (-1). The rows of a tensor may lie apart, as in the pages of a serving engine.

Shapes: q, out [B, H, D or Dv]; ring [rows, KV, w, .], kept [rows, KV, P, .], sinks [rows, KV, s, .].
Bytes: the state once read, KV (w + P + s) (D + Dv) numbers per text. Numbers of 8 or 4 bits (`PairCodec`) are decoded
in registers, and pairs move from place to place as the bytes that they are. Keys and values are those that were coded,
scaled and mixed: the kernel is given queries that the codec maps, and its output is mapped back at the end.
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

from lolcats.ops.hybrid.kernels.decode import advance_kernel, state_row
from lolcats.ops.hybrid.kernels.launch import SMALLEST, either, on, padded, precision
from lolcats.ops.hybrid.kernels.tiles import LOG2E, add_softmax, load_tile, store_tile
from lolcats.ops.hybrid.layout import ROWS_APART, contiguous_rows
from lolcats.ops.near.kernels.launch import device_of, refusal
from lolcats.ops.near.kernels.tiles import SIZES, capped
from lolcats.ops.near.quantize import CURVE as LEVEL_CURVE
from lolcats.ops.near.quantize import STEP_BYTES as BYTES_OF_STEP
from lolcats.ops.near.quantize import PairCodec, spread
from lolcats.ops.near.types import NearSpec, NearState

LARGEST_PAIRS = 4096
"""Scores of kept pairs that a program holds in registers."""
KEYS = 64
"""Slots of a tile."""
CURVE, STEP_BYTES = tl.constexpr(LEVEL_CURVE), tl.constexpr(BYTES_OF_STEP)


@triton.jit
def ring_positions(now, slot, ring):
    """Positions of the tokens in slots of the ring that holds `now`, and which slots are filled."""
    age = now % ring - slot
    position = now - tl.where(age < 0, age + ring, age)
    return position, (slot < ring) & (position >= 0)


@triton.jit
def read_float16(base, inside):
    """The float16 whose two bytes are at `base` [K] of bytes, as float32."""
    low = tl.load(base, mask=inside, other=0).to(tl.int16)
    high = tl.load(base + 1, mask=inside, other=0).to(tl.int16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def read_pairs(
    base, slot, inside, like,
    width: tl.constexpr, size: tl.constexpr, block: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Keys or values of `slot` [K] of rows of `width` as a tile [K, block] in the dtype of `like`.

    Rows of fewer bits end in the step of a token; before it is that of the first WIDE numbers, which have 8 bits.
    """
    column = tl.arange(0, block)
    mask = inside[:, None] & (column < size)[None, :]
    rows = base + slot * width
    if BITS == 16:
        tile = tl.load(rows[:, None] + column[None, :], mask=mask, other=0)
    else:
        step = read_float16(rows + width - STEP_BYTES, inside)
        if BITS == 8:
            u = tl.load(rows[:, None] + column[None, :], mask=mask, other=0).to(tl.float32) - 127.5
            tile = u * step[:, None]
        else:
            is_wide = column < WIDE
            place = tl.where(is_wide, column, WIDE + (column - WIDE) // 2)
            byte = tl.load(rows[:, None] + place[None, :], mask=mask, other=0).to(tl.int32)
            u = ((byte >> ((column % 2) * 4)[None, :]) & 15).to(tl.float32) - 7.5  # WIDE is even
            tile = u * (1 + CURVE * u * u) * step[:, None]
            if WIDE > 0:
                wide_step = read_float16(rows + width - 2 * STEP_BYTES, inside)
                tile = tl.where(is_wide[None, :], (byte.to(tl.float32) - 127.5) * wide_step[:, None], tile)
        tile = tl.where(mask, tile, 0.0)
    return tile.to(like.dtype)


ROWS = [f"{name}_row" for name in ("length", "ring_k", "ring_v", "ring_s", "kept_k", "kept_v", "kept_s", "kept_p")]
"""Distances of the rows of a state's tensors, which depend on sizes. `ALIGNED` says that those of pairs are multiples
of 16: else the compiler could not read more than a number at a time."""


@triton.jit(do_not_specialize=[*SIZES, *ROWS, "sink_k_row", "sink_v_row"])
def near_decode(
    q, k, v, score, sink_logits, active, indices, length,
    ring_k, ring_v, ring_score, kept_k, kept_v, kept_score, kept_position, sink_k, sink_v, sink_q, out,
    q_b, q_h, k_b, k_h, v_b, v_h, length_row, ring_k_row, ring_v_row, ring_s_row, kept_k_row, kept_v_row, kept_s_row,
    kept_p_row, sink_k_row, sink_v_row, window, pairs, reach, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    BITS: tl.constexpr, WIDE: tl.constexpr, WK: tl.constexpr, BWK: tl.constexpr, WV: tl.constexpr, BWV: tl.constexpr,
    SINKS: tl.constexpr, BS: tl.constexpr, HAS_PAIRS: tl.constexpr, BP: tl.constexpr,
    SOFTCAP: tl.constexpr, LEARNED: tl.constexpr, HAS_ACTIVE: tl.constexpr, HAS_INDICES: tl.constexpr,
    HAS_SINK_Q: tl.constexpr, HAS_REACH: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr, K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (batch, key heads)."""
    batch = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    text, alive = state_row(active, indices, batch, HAS_ACTIVE, HAS_INDICES)
    if alive == 0:
        return
    now = tl.load(length + text * length_row).to(tl.int32)
    own = now % window  # slot of the new token, so far of the oldest
    g = tl.arange(0, BG)
    kc = tl.arange(0, BWK)
    vc = tl.arange(0, BWV)
    one = tl.arange(0, 1)
    if ALIGNED:
        ring_k_row, ring_v_row = tl.multiple_of(ring_k_row, 16), tl.multiple_of(ring_v_row, 16)
        kept_k_row, kept_v_row = tl.multiple_of(kept_k_row, 16), tl.multiple_of(kept_v_row, 16)
    ring_k += text * ring_k_row + kv_head * window * WK
    ring_v += text * ring_v_row + kv_head * window * WV
    k += batch * k_b + kv_head * k_h
    v += batch * v_b + kv_head * v_h
    q_tile = load_tile(q + batch * q_b + kv_head * GROUP * q_h, q_h, 0, GROUP, 0, BG, D, BD)
    k_new = read_pairs(k, one, one < 1, q_tile, WK, D, BD, BITS, WIDE)
    v_new = read_pairs(v, one, one < 1, q_tile, WV, DV, BV, BITS, 0)
    top = tl.full((BG,), -float("inf"), tl.float32)
    denominator = tl.zeros((BG,), tl.float32)
    acc = tl.zeros((BG, BV), tl.float32)
    if LEARNED:
        top = tl.load(sink_logits + kv_head * GROUP + g, mask=g < GROUP, other=0.0).to(tl.float32) * LOG2E
        denominator += 1.0
    if SINKS > 0:
        sink = tl.arange(0, BS)
        sink_k += text * sink_k_row + kv_head * SINKS * WK
        sink_v += text * sink_v_row + kv_head * SINKS * WV
        sk = read_pairs(sink_k, sink, sink < SINKS, q_tile, WK, D, BD, BITS, WIDE)
        sk = tl.where((sink == now)[:, None], k_new, sk)
        sv = read_pairs(sink_v, sink, sink < SINKS, q_tile, WV, DV, BV, BITS, 0)
        sv = tl.where((sink == now)[:, None], v_new, sv)
        sink_tile = q_tile
        if HAS_SINK_Q:
            sink_tile = load_tile(sink_q + (batch * KV_HEADS + kv_head) * GROUP * D, D, 0, GROUP, 0, BG, D, BD)
        sink_scores = capped(tl.dot(sink_tile, tl.trans(sk), input_precision=PRECISION), scale, SOFTCAP)
        sink_scores = tl.where(((sink <= now) & (sink < SINKS))[None, :], sink_scores, -float("inf"))
        top, denominator, acc = add_softmax(top, denominator, acc, sink_scores, sv, PRECISION)
    if HAS_PAIRS:
        kept_k += text * kept_k_row + kv_head * pairs * WK
        kept_v += text * kept_v_row + kv_head * pairs * WV
        kept_score += text * kept_s_row + kv_head * pairs
        kept_position += text * kept_p_row + kv_head * pairs
        ring_score += text * ring_s_row + kv_head * window
        place = tl.arange(0, BP)
        marks = tl.load(kept_score + place, mask=place < pairs, other=float("inf"))
        lowest = tl.min(marks, 0)
        left = tl.load(ring_score + own)
        enters = (now - window >= SINKS) & (left > lowest)
        # Of equal ones the latest goes, as in a text that is read at once.
        since = tl.load(kept_position + place, mask=place < pairs, other=-1)
        since = tl.where(marks == lowest, since, -1)
        worst = tl.min(tl.where(since == tl.max(since, 0), place, BP), 0)
        k_left = read_pairs(ring_k, own + one, one < 1, q_tile, WK, D, BD, BITS, WIDE)
        v_left = read_pairs(ring_v, own + one, one < 1, q_tile, WV, DV, BV, BITS, 0)
        for first in tl.range(0, pairs, K, num_stages=STAGES):
            slot = first + tl.arange(0, K)
            entering = (slot == worst) & enters
            mark = tl.load(kept_score + slot, mask=slot < pairs, other=-float("inf"))
            keys = read_pairs(kept_k, slot, slot < pairs, q_tile, WK, D, BD, BITS, WIDE)
            keys = tl.where(entering[:, None], k_left, keys)
            values = read_pairs(kept_v, slot, slot < pairs, q_tile, WV, DV, BV, BITS, 0)
            values = tl.where(entering[:, None], v_left, values)
            s = capped(tl.dot(q_tile, tl.trans(keys), input_precision=PRECISION), scale, SOFTCAP)
            seen = mark > -float("inf")
            if HAS_REACH:
                age = now - tl.load(kept_position + slot, mask=slot < pairs, other=0)
                age = tl.where(entering, window, age)
                seen = (seen | entering) & (age < reach)
            else:
                seen = seen | entering
            s = tl.where(seen[None, :], s, -float("inf"))
            top, denominator, acc = add_softmax(top, denominator, acc, s, values, PRECISION)
    for first in tl.range(0, window, K, num_stages=STAGES):
        slot = first + tl.arange(0, K)
        position, inside = ring_positions(now, slot, window)
        keys = read_pairs(ring_k, slot, slot < window, q_tile, WK, D, BD, BITS, WIDE)
        keys = tl.where((slot == own)[:, None], k_new, keys)
        values = read_pairs(ring_v, slot, slot < window, q_tile, WV, DV, BV, BITS, 0)
        values = tl.where((slot == own)[:, None], v_new, values)
        s = capped(tl.dot(q_tile, tl.trans(keys), input_precision=PRECISION), scale, SOFTCAP)
        s = tl.where((inside & (position >= SINKS))[None, :], s, -float("inf"))
        top, denominator, acc = add_softmax(top, denominator, acc, s, values, PRECISION)
    to = out + (batch * KV_HEADS + kv_head) * GROUP * DV
    store_tile(to, DV, 0, GROUP, 0, acc / denominator[:, None], BG, DV, BV)

    k_stored = tl.load(k + kc, mask=kc < WK, other=0)
    v_stored = tl.load(v + vc, mask=vc < WV, other=0)
    if HAS_PAIRS:
        k_moved = tl.load(ring_k + own * WK + kc, mask=kc < WK, other=0)
        v_moved = tl.load(ring_v + own * WV + vc, mask=vc < WV, other=0)
    tl.debug_barrier()  # all is read before anything is written
    tl.store(ring_k + own * WK + kc, k_stored, mask=kc < WK)
    tl.store(ring_v + own * WV + vc, v_stored, mask=vc < WV)
    if SINKS > 0:
        tl.store(sink_k + now * WK + kc, k_stored, mask=kc < tl.where(now < SINKS, WK, 0))
        tl.store(sink_v + now * WV + vc, v_stored, mask=vc < tl.where(now < SINKS, WV, 0))
    if HAS_PAIRS:
        tl.store(ring_score + own, tl.load(score + batch * KV_HEADS + kv_head))
        tl.store(kept_k + worst * WK + kc, k_moved, mask=kc < tl.where(enters, WK, 0))
        tl.store(kept_v + worst * WV + vc, v_moved, mask=vc < tl.where(enters, WV, 0))
        tl.store(kept_score + worst, left, mask=enters)
        tl.store(kept_position + worst, now - window, mask=enters)


def step_refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: NearState,
    in_pool: bool,
    sink_logits: Tensor | None,
    codec: PairCodec | None = None,
) -> str | None:
    """Why `decode_step` does not take a call, or None."""
    numbers = (q, k, v)
    if codec is not None:
        numbers = q, q, q[..., :1].expand(*q.shape[:3], codec.value_size(v.shape[3]))
    if (reason := refusal(*numbers, False, sink_logits)) is not None:
        return reason
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, sink_logits) if x is not None):
        return "it gives no gradients; decode under torch.no_grad()"
    if codec is None and q.dtype != v.dtype:
        return f"it takes queries and values of one dtype; got {q.dtype} and {v.dtype}"
    if state.kept is not None:
        if state.kept.score.dtype != torch.float32:
            return f"it takes scores of float32 in the state; got {state.kept.score.dtype}"
        if state.kept.score.shape[2] > LARGEST_PAIRS:
            return f"it takes up to {LARGEST_PAIRS} kept pairs; got {state.kept.score.shape[2]}"
    if in_pool and not all(contiguous_rows(t) for t in state.tensors()):
        return ROWS_APART
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
    codec: PairCodec | None = None,
    sink_q: Tensor | None = None,
) -> Tensor:
    """`near_step` with contiguous rows in `state`, which are changed in place; returns the output [B, H, 1, Dv].

    With a codec k and v are bytes, as it encodes them.
    """
    (batch, heads, _, size), kv_heads, dv = q.shape, k.shape[1], v.shape[3]
    if codec is not None:
        q, dv = codec.map_queries(q), codec.value_size(dv)
        sink_q = None if sink_q is None else codec.map_queries(sink_q)
    ring, sinks, kept = state.ring, state.sinks, state.kept
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    make = torch.empty if active is None and state_indices is None else torch.zeros
    out = make(batch, heads, 1, dv, dtype=q.dtype, device=q.device)
    score = None if score is None else score.float().contiguous()
    # `active` is often a column of a wide mask.
    active, indices = (None if x is None else x.contiguous() for x in (active, state_indices))
    sink_q = None if sink_q is None else sink_q.to(q.dtype).contiguous()
    flags = {"HAS_ACTIVE": active is not None, "HAS_INDICES": indices is not None}
    parts = state.length, ring.k, ring.v, either(ring.score, q), *(kept or (q, q, q, q)), *(sinks or (q, q))
    with device_of(v):
        on(near_decode, (batch, kv_heads))(
            q, k, v, either(score, q), either(sink_logits, q), either(active, q), either(indices, q), *parts,
            either(sink_q, q), out, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            *(x.stride(0) for x in parts), spec.window, spec.pairs, spec.reach or 0, spec.product_scale(size),
            KV_HEADS=kv_heads, GROUP=heads // kv_heads, BG=padded(heads // kv_heads), D=size,
            BD=max(SMALLEST, padded(size)), DV=dv, BV=max(SMALLEST, padded(dv)),
            BITS=16 if codec is None else codec.bits, WIDE=0 if codec is None else codec.wide(size),
            WK=k.shape[3], BWK=padded(k.shape[3]), WV=v.shape[3], BWV=padded(v.shape[3]),
            SINKS=spec.sinks, BS=padded(spec.sinks), HAS_PAIRS=spec.pairs > 0, BP=padded(spec.pairs),
            SOFTCAP=float(spec.softcap or 0.0), LEARNED=sink_logits is not None, **flags,
            HAS_SINK_Q=sink_q is not None, HAS_REACH=spec.reach is not None, PRECISION=precision(q.dtype), K=KEYS,
            ALIGNED=codec is None and all(x.stride(0) % 16 == 0 for x in (*ring[:2], *(kept or ())[:2])),
            STAGES=3 if q.element_size() == 2 else 1, num_warps=4,
        )  # fmt: skip
        on(advance_kernel, (batch,))(
            state.length, either(active, q), either(indices, q), state.length.stride(0), **flags, num_warps=1
        )
    return out if codec is None else spread(out.float()).to(out.dtype)
