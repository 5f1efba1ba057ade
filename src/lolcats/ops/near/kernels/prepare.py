"""What comes before the attention of a decoding step, in two launches: the score of the new key, and the codec.

1. `read_hidden_kernel`: the product of the layer's input and the first matrix of the score's hidden part, in parts: a
   program has a few outputs, a slice of the input's channels and up to 16 texts. Normalization comes afterwards, as
   W (x - m) r = r (W x - m W 1), so nothing waits for mean and variance: each slice has its own sum and sum of squares
   about its mean.
2. `prepare_kernel`, up to four programs for each text and key head: the score from these parts, from k before its
   rotation and from v; the bytes of k and v; the queries of the group as the codec maps them; and the same as sinks see
   them, turned to the end of the model's context where the text is longer.

Bytes and queries are those of `PairCodec`, bit by bit: all is done by the same additions in the same order, divisions
are rounded correctly, and no product is fused with an addition (`enable_fp_fusion`). A score may differ from torch's by
the order of its sums; no sum depends on how many texts there are.

Legend: B batch, H query heads, KV key heads, D key size, Dv value size.
Bytes: the matrices of the score, what comes in and what goes out; in between the parts, some 128 R (B + 1), where R is
the width of the hidden part.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats.ops.devices import device_of
from lolcats.ops.hybrid.kernels.launch import either, next_power, on, pieces, precision
from lolcats.ops.near.kernels.codes import code_rows, read_map, round_even, scales_on, store_rows
from lolcats.ops.near.kernels.spread import mixed_rows
from lolcats.ops.near.prepared import Prepared, ScoreCall, SinkCall
from lolcats.ops.near.quantize import PairCodec
from lolcats.ops.near.types import STEP_BYTES

TEXTS, OUTPUTS = 16, 32
"""Of a program of `read_hidden_kernel`."""
WANTED_SLICES = 32
"""Into how many slices channels are cut, more where these were too large: a hundred programs run for one text too."""
SMALLEST_SLICE, LARGEST_SLICE = 32, 128
"""Channels of a slice; a program holds them in registers, which 256 overflow."""
EPS = tl.constexpr(1e-5)
"""Of the normalization, as `layer_norm` has it."""


@triton.jit(do_not_specialize=["rows"])
def read_hidden_kernel(
    hidden, weight, parts, hidden_b, rows,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, BB: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (rows / BB, WIDTH / BN, SLICES).

    `parts`: [SLICES, rows + 1, WIDTH] products, of which the last row is W 1; then [SLICES, rows, 2] sums and squares.
    """
    row = tl.program_id(0) * BB + tl.arange(0, BB)
    output = tl.program_id(1) * BN + tl.arange(0, BN)
    part = tl.program_id(2)
    channel = part * SLICE + tl.arange(0, SLICE)
    inside = (row < rows)[:, None] & (channel < SIZE)[None, :]
    x = tl.load(hidden + row.to(tl.int64)[:, None] * hidden_b + channel[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    w = tl.load(weight + output[:, None] * SIZE + channel[None, :], mask=(channel < SIZE)[None, :], other=0.0)
    products = tl.dot(x, tl.trans(w), input_precision=PRECISION)
    to = parts + part * (rows + 1) * WIDTH
    tl.store(to + row[:, None] * WIDTH + output[None, :], products, mask=(row < rows)[:, None])
    if tl.program_id(0) == 0:
        tl.store(to + rows * WIDTH + output, tl.sum(w, 1))
    if tl.program_id(1) == 0:
        total = tl.sum(x, 1)
        count = tl.minimum(SIZE - part * SLICE, SLICE)
        off = tl.where(inside, x - (total / count)[:, None], 0.0)
        moments = parts + SLICES * (rows + 1) * WIDTH + (part * rows + row) * 2
        tl.store(moments, total, mask=row < rows)
        tl.store(moments + 1, tl.sum(off * off, 1), mask=row < rows)


@triton.jit
def gelu(x):
    """The exact one."""
    return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def hidden_numbers(
    parts, bias, last, last_bias, batch, kv_head, rows,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """What the layer's input says of a key head: the logs of the largest and of the summed attention."""
    part = tl.arange(0, BS)
    output = tl.arange(0, WIDTH)
    inside = part < SLICES
    of_part = parts + SLICES * (rows + 1) * WIDTH + (part * rows + batch) * 2
    totals = tl.load(of_part, mask=inside, other=0.0)
    squares = tl.load(of_part + 1, mask=inside, other=0.0)
    from_row = parts + part[:, None] * (rows + 1) * WIDTH + output[None, :]
    products = tl.sum(tl.load(from_row + batch * WIDTH, mask=inside[:, None], other=0.0), 0)
    of_one = tl.sum(tl.load(from_row + rows * WIDTH, mask=inside[:, None], other=0.0), 0)
    mean = tl.sum(totals, 0) / SIZE
    count = tl.minimum(SIZE - part * SLICE, SLICE).to(tl.float32)
    apart = totals / tl.where(inside, count, 1.0) - mean
    variance = tl.sum(tl.where(inside, squares + count * apart * apart, 0.0), 0) / SIZE
    y = (products - mean * of_one) / tl.sqrt(variance + EPS) + tl.load(bias + output)
    y = gelu(y)
    last += 2 * kv_head * WIDTH + output
    largest = tl.sum(y * tl.load(last), 0) + tl.load(last_bias + 2 * kv_head)
    summed = tl.sum(y * tl.load(last + WIDTH), 0) + tl.load(last_bias + 2 * kv_head + 1)
    return largest, summed


@triton.jit
def pair_of(column, FIRST: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of channels: whether they are turned, are the second of their pair, which pair, and the other one of it."""
    place = column - FIRST
    turned = (place >= 0) & (place < WIDTH)
    if INTERLEAVED:
        second = place % 2 == 1
        pair = place // 2
        partner = tl.where(second, column - 1, column + 1)
    else:
        second = place >= WIDTH // 2
        pair = tl.where(second, place - WIDTH // 2, place)
        partner = tl.where(second, column - WIDTH // 2, column + WIDTH // 2)
    return turned, second, pair, partner


@triton.jit
def angles_back(cos, sin, at, turned):
    """Cosines and sines that undo a rotation, whatever it scales."""
    c = tl.load(cos + at, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + at, mask=turned, other=0.0).to(tl.float32)
    size = c * c + s * s
    return tl.div_rn(c, size), tl.div_rn(-s, size)


@triton.jit
def unrotated_key(
    k, cos, sin, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
    ANGLE: tl.constexpr,
):  # fmt: skip
    """The key [D] at k before its rotation, rounded to its dtype, in float32; see `Turn`."""
    column = tl.arange(0, D)
    y = tl.load(k + column).to(tl.float32)
    if WIDTH > 0:
        turned, second, pair, partner = pair_of(column, FIRST, WIDTH, INTERLEAVED)
        other = tl.load(k + partner, mask=turned, other=0.0).to(tl.float32)
        c, s = angles_back(cos, sin, pair * ANGLE, turned)
        back = tl.where(second, y * c + other * s, y * c - other * s)
        y = tl.where(turned, back, y).to(k.dtype.element_ty).to(tl.float32)
    return y


@triton.jit
def queries_at_end(
    from_row, y, column, is_head, cos, sin, last_cos, last_sin,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr, ANGLE: tl.constexpr,
):  # fmt: skip
    """Queries y [BG, D] of channels `column` of the rows, with their rotation undone and the last one applied.

    Rounded to their dtype after each of both, in float32.
    """
    dtype = from_row.dtype.element_ty
    turned, second, pair, partner = pair_of(column, FIRST, WIDTH, INTERLEAVED)
    other = tl.load(from_row + partner[None, :], mask=is_head & turned[None, :], other=0.0).to(tl.float32)
    c, s = angles_back(cos, sin, pair * ANGLE, turned)
    one = tl.where(second[None, :], other, y)
    two = tl.where(second[None, :], y, other)
    back_one = (one * c[None, :] - two * s[None, :]).to(dtype).to(tl.float32)
    back_two = (two * c[None, :] + one * s[None, :]).to(dtype).to(tl.float32)
    c = tl.load(last_cos + pair, mask=turned, other=1.0)[None, :]
    s = tl.load(last_sin + pair, mask=turned, other=0.0)[None, :]
    capped = tl.where(second[None, :], back_two * c + back_one * s, back_one * c - back_two * s)
    return tl.where(turned[None, :], capped.to(dtype).to(tl.float32), y)


@triton.jit
def pair_numbers(
    k_row, v, weight, bias, last, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """What a pair, the key as [D] and the value at v, says of its key."""
    output = tl.arange(0, WIDTH)
    key = tl.arange(0, D)
    value = tl.arange(0, DV)
    weight += output[:, None] * (D + DV)
    y = tl.sum(tl.load(weight + key[None, :]) * k_row[None, :], 1)
    v_row = tl.load(v + value).to(tl.float32)
    y += tl.sum(tl.load(weight + D + value[None, :]) * v_row[None, :], 1)
    y = gelu(y + tl.load(bias + output))
    return tl.sum(y * tl.load(last + output), 0), tl.sum(y * tl.load(last + WIDTH + output), 0)


@triton.jit
def row_of(indices, batch, HAS_INDICES: tl.constexpr):
    """Where the text of a row is in its pool."""
    if HAS_INDICES:
        return tl.maximum(tl.load(indices + batch).to(tl.int64), 0)
    return batch


@triton.jit(do_not_specialize=["rows", "length_row", "context"])
def prepare_kernel(
    q, k, v, key_map, scales, parts, read_hidden_bias, from_hidden, from_hidden_bias, read_pair, read_pair_bias,
    from_pair, cos, sin, last_cos, last_sin, length, indices, q_out, k_out, v_out, score_out, sink_out,
    q_b, q_h, k_b, k_h, v_b, v_h, cos_b, sin_b, context, length_row, rows, mix, rest, resolution, fade, k_root, v_root,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, D_LEVELS: tl.constexpr,
    DV: tl.constexpr, DV_LEVELS: tl.constexpr, HAS_CODEC: tl.constexpr, HAS_SCORE: tl.constexpr,
    HAS_FADE: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_INDICES: tl.constexpr, BY_INVERSE: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr, BS: tl.constexpr,
    PAIR_WIDTH: tl.constexpr, FIRST: tl.constexpr, TURNED: tl.constexpr, SCORE_TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr, ANGLE: tl.constexpr,
):  # fmt: skip
    """Grid: (B, KV, tasks): the score, then pairs, then queries, then those for sinks, whichever are wanted.

    Outputs: q and those for sinks [B, H, D], k and v [B, KV, size + 2] of bytes, score [B, KV].
    """
    batch = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    task = tl.program_id(2)
    head = batch * KV_HEADS + kv_head
    k += batch * k_b + kv_head * k_h
    v += batch * v_b + kv_head * v_h
    cos += batch * cos_b
    sin += batch * sin_b
    if HAS_SCORE:
        if task == 0:
            k_row = unrotated_key(k, cos, sin, D, FIRST, SCORE_TURNED, INTERLEAVED, ANGLE)
            largest, summed = pair_numbers(k_row, v, read_pair, read_pair_bias, from_pair, D, DV, PAIR_WIDTH)
            by_hidden, by_hidden_sum = hidden_numbers(
                parts, read_hidden_bias, from_hidden, from_hidden_bias, batch, kv_head, rows, SIZE, WIDTH, SLICE,
                SLICES, BS,
            )  # fmt: skip
            score = mix * (by_hidden + largest) + rest * (by_hidden_sum + summed)
            score = tl.div_rn(round_even(score * resolution), resolution)
            if HAS_FADE:
                position = tl.load(length + row_of(indices, batch, HAS_INDICES) * length_row).to(tl.float32)
                if BY_INVERSE:
                    score += position * fade
                else:
                    score += tl.div_rn(position, fade)
            tl.store(score_out + head, score)
        task -= 1
    if HAS_CODEC:
        if task == 0:
            order, scale = read_map(key_map, scales, kv_head, KV_HEADS, D)
            key = (tl.load(k + order).to(tl.float32) * scale)[None, :]
            one = tl.arange(0, 1)
            code, step = code_rows(mixed_rows(key, D, D_LEVELS, 1) * k_root, BY_INVERSE)
            store_rows(k_out + head * (D + 2), one, code, step, one < 1, D)
            value = tl.load(v + tl.arange(0, DV))[None, :].to(tl.float32)
            code, step = code_rows(mixed_rows(value, DV, DV_LEVELS, 1) * v_root, BY_INVERSE)
            store_rows(v_out + head * (DV + 2), one, code, step, one < 1, DV)
        task -= 1
    if HAS_CODEC or HAS_SINKS:
        if task >= 0:
            g = tl.arange(0, BG)
            is_head = (g < GROUP)[:, None]
            from_row = q + batch * q_b + (kv_head * GROUP + g)[:, None] * q_h
            order = tl.arange(0, D)
            if HAS_CODEC:
                order, scale = read_map(key_map, scales, kv_head, KV_HEADS, D)
            queries = tl.load(from_row + order[None, :], mask=is_head, other=0.0).to(tl.float32)
            to = q_out
            if HAS_SINKS:
                if task == (1 if HAS_CODEC else 0):
                    to = sink_out
                    if tl.load(length + row_of(indices, batch, HAS_INDICES) * length_row) >= context:
                        queries = queries_at_end(
                            from_row, queries, order, is_head, cos, sin, last_cos, last_sin, FIRST, TURNED, INTERLEAVED,
                            ANGLE,
                        )  # fmt: skip
            if HAS_CODEC:
                queries = mixed_rows(tl.div_rn(queries, scale[None, :]), D, D_LEVELS, BG) * k_root
            to += (head * GROUP + g)[:, None] * D + tl.arange(0, D)[None, :]
            tl.store(to, queries.to(to.dtype.element_ty), mask=is_head)


class Turn(NamedTuple):
    """Which channels a rotation turns, and where their angles are; from a `Layout` of `lolcats.mixers.rotation`."""

    first: int = 0
    """The first channel that is turned."""
    width: int = 0
    """So many are; 0 without a rotation."""
    interleaved: bool = False
    """Neighbours make a pair, instead of channels that are half the width apart."""
    angle: int = 1
    """The angle of pair i is at i times this."""

    @classmethod
    def of(cls, call: ScoreCall | SinkCall | None, size: int) -> Turn:
        """Of queries and keys of `size` channels."""
        if call is None or call.cos is None or call.layout is None or call.layout[0] == "none":
            return cls()
        pairs, place, angles = call.layout
        width = call.cos.shape[-1] * (2 if angles == "single" else 1)
        first = 0 if place == "first" else size - width
        return cls(first, width, pairs == "interleaved", 2 if angles == "repeat" else 1)


class Slices(NamedTuple):
    """How the channels of a layer's input are cut."""

    size: int = 0
    """Of the input."""
    slice: int = 0
    """Channels of a slice."""
    number: int = 0

    @classmethod
    def of(cls, score: ScoreCall | None) -> Slices:
        """The same for any number of texts, so that a text has the same score in every batch."""
        if score is None:
            return cls()
        size = score.hidden.shape[-1]
        wanted = next_power(pieces(size, WANTED_SLICES))
        width = min(max(wanted, SMALLEST_SLICE), LARGEST_SLICE)
        return cls(size, width, pieces(size, width))


def code_pairs_and_score(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codec: PairCodec | None,
    score: ScoreCall | None,
    length: Tensor,
    state_indices: Tensor | None,
    sinks: SinkCall | None,
) -> Prepared:
    """`prepare_step` of what `prepare_refusal` lets through; a codec, a score or queries for sinks are wanted."""
    (batch, heads, _, size), kv_heads, dv = q.shape, k.shape[1], v.shape[3]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    done = _outputs(q, k, v, codec, score, sinks)
    tasks = (score is not None) + 2 * (codec is not None) + (sinks is not None)
    with device_of(v):
        parts = None if score is None else _read_hidden(score)
        key_map, scales = (q, q) if codec is None else (codec.key_map.contiguous(), scales_on(q.device))
        pointers, numbers, constants = _score_arguments(score, parts, q)
        angles, steps, turn = _turn_arguments(score, sinks, q)
        indices = None if state_indices is None else state_indices.contiguous()
        on(prepare_kernel, (batch, kv_heads, tasks))(
            q, k, v, key_map, scales, *pointers, *angles, length, either(indices, q), *done[:3], either(done.score, q),
            either(done.sink_q, q), q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            *steps, length.stride(0), batch, *numbers, size**-0.5, dv**-0.5,
            KV_HEADS=kv_heads, GROUP=heads // kv_heads, BG=next_power(heads // kv_heads),
            D=size, D_LEVELS=size.bit_length() - 1, DV=dv, DV_LEVELS=dv.bit_length() - 1,
            HAS_CODEC=codec is not None, HAS_SCORE=score is not None, HAS_INDICES=indices is not None,
            HAS_SINKS=sinks is not None, BY_INVERSE=q.is_cuda, **constants, **turn, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return done


def _outputs(
    q: Tensor, k: Tensor, v: Tensor, codec: PairCodec | None, score: ScoreCall | None, sinks: SinkCall | None
) -> Prepared:
    """Room for what is wanted; q, k and v themselves where there is no codec."""
    (batch, kv_heads), device = k.shape[:2], q.device
    done = Prepared(q, k, v, None)
    if codec is not None:
        sizes = (n + STEP_BYTES for n in (k.shape[3], v.shape[3]))
        bytes_ = (torch.empty(batch, kv_heads, 1, n, dtype=torch.uint8, device=device) for n in sizes)
        done = Prepared(torch.empty(q.shape, dtype=q.dtype, device=device), *bytes_, None)
    if score is not None:
        done = done._replace(score=torch.empty(batch, kv_heads, 1, dtype=torch.float32, device=device))
    return done if sinks is None else done._replace(sink_q=torch.empty(q.shape, dtype=q.dtype, device=device))


def _read_hidden(score: ScoreCall) -> Tensor:
    """The parts of the hidden part; see `read_hidden_kernel`."""
    hidden, weight, cut = score.hidden, score.weights.read_hidden.contiguous(), Slices.of(score)
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    batch, width = hidden.shape[0], weight.shape[0]
    numbers = cut.number * ((batch + 1) * width + 2 * batch)
    parts = torch.empty(numbers, dtype=torch.float32, device=hidden.device)
    on(read_hidden_kernel, (pieces(batch, TEXTS), width // OUTPUTS, cut.number))(
        hidden, weight, parts, hidden.stride(0), batch,
        SIZE=cut.size, WIDTH=width, SLICE=cut.slice, SLICES=cut.number, BB=TEXTS, BN=OUTPUTS,
        PRECISION=precision(torch.float32), num_warps=4,
    )  # fmt: skip
    return parts


def _score_arguments(
    score: ScoreCall | None, parts: Tensor | None, other: Tensor
) -> tuple[list[Tensor], list[Any], dict[str, Any]]:
    """Pointers, numbers and constants of `prepare_kernel`; `other` is for pointers that are not read."""
    cut = Slices.of(score)
    constants = {
        "SIZE": cut.size, "SLICE": cut.slice, "SLICES": cut.number, "BS": next_power(max(1, cut.number)),
        "HAS_FADE": score is not None and score.fade is not None,
    }  # fmt: skip
    if score is None or parts is None:
        return [other] * 7, [0.0, 0.0, 0.0, 0.0], constants | {"WIDTH": 1, "PAIR_WIDTH": 1}
    w = score.weights
    # By what torch divides on each device: on a GPU it multiplies by the inverse of a number of the host.
    fade = float(score.fade or 1)
    numbers = [score.mix, 1 - score.mix, float(score.resolution), 1 / fade if other.is_cuda else fade]
    pointers = [x.contiguous() for x in (*w[1:2], *w[4:6], *w[2:4], *w[6:])]
    constants |= {"WIDTH": w.read_hidden.shape[0], "PAIR_WIDTH": w.read_pair.shape[0]}
    return [parts, *pointers], numbers, constants


def _turn_arguments(
    score: ScoreCall | None, sinks: SinkCall | None, other: Tensor
) -> tuple[list[Tensor], list[int], dict[str, Any]]:
    """The same of rotations: the score and the sinks' queries undo the same one, that of the step's tokens."""
    of_score = Turn.of(score, other.shape[3])
    turn = of_score if sinks is None else Turn.of(sinks, other.shape[3])
    call = score if sinks is None else sinks
    own = (None, None) if call is None or not turn.width else (call.cos, call.sin)
    last = (None, None) if sinks is None or not turn.width else (sinks.last_cos.float(), sinks.last_sin.float())
    angles = [other if x is None else x if x.stride(-1) == 1 else x.contiguous() for x in (*own, *last)]
    # One rotation may be that of all texts.
    steps = [0 if x is None or x.shape[0] == 1 else x.stride(0) for x in own]
    constants = {
        "FIRST": turn.first, "TURNED": turn.width, "SCORE_TURNED": of_score.width, "INTERLEAVED": turn.interleaved,
        "ANGLE": turn.angle,
    }  # fmt: skip
    return angles, [*steps, 0 if sinks is None else sinks.tokens], constants
