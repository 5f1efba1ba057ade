"""The learned score of the keys of a text, from what the layer's input says: `prepare_kernel` does it for one token.

A program has ROWS tokens of one key head: their keys with the rotation undone and their values, the hidden numbers that
a pair gives, and the score. In torch these are some 40 operations over copies in float32.

Legend: B batch, KV key heads, N tokens, D key size, Dv value size, S hidden numbers of a pair.
Bytes: k, v and the numbers of the layer's input once read, the score once written.
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

from lolcats.ops.devices import device_of
from lolcats.ops.hybrid.kernels.launch import either, on, pieces, precision, strides
from lolcats.ops.near.kernels.codes import round_even
from lolcats.ops.near.kernels.prepare import Turn, angles_back, gelu, pair_of
from lolcats.ops.near.prepared import ScoreCall

ROWS = 32


@triton.jit
def unrotated_keys(
    k, k_n, row, inside, cos, sin, cos_n, sin_n, D: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr, ANGLE: tl.constexpr,
):  # fmt: skip
    """Keys [ROWS, D] before their rotation, rounded to their dtype, in float32."""
    column = tl.arange(0, D)
    y = tl.load(k + row[:, None] * k_n + column[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    if WIDTH > 0:
        turned, second, pair, partner = pair_of(column, FIRST, WIDTH, INTERLEAVED)
        turned = turned[None, :] & inside[:, None]
        other = tl.load(k + row[:, None] * k_n + partner[None, :], mask=turned, other=0.0).to(tl.float32)
        at = (pair * ANGLE)[None, :]
        c, s = angles_back(cos + row[:, None] * cos_n, sin + row[:, None] * sin_n, at, turned)
        back = tl.where(second[None, :], y * c + other * s, y * c - other * s)
        y = tl.where(turned, back, y).to(k.dtype.element_ty).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["tokens"])
def score_keys_kernel(
    k, v, cos, sin, numbers, weight, bias, last, out, k_b, k_h, k_n, v_b, v_h, v_n, cos_b, cos_n, sin_b, sin_n, tokens,
    mix, rest, resolution,
    KV_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, FIRST: tl.constexpr,
    TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, ANGLE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (B KV, N / ROWS). `numbers`: [B, N, 2 KV], what the layer's input says of each key head."""
    head = tl.program_id(0).to(tl.int64)
    batch, kv_head = head // KV_HEADS, head % KV_HEADS
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens
    key = unrotated_keys(
        k + batch * k_b + kv_head * k_h, k_n, row, inside, cos + batch * cos_b, sin + batch * sin_b, cos_n, sin_n,
        D, FIRST, TURNED, INTERLEAVED, ANGLE,
    )  # fmt: skip
    v += batch * v_b + kv_head * v_h
    value = tl.load(v + row[:, None] * v_n + tl.arange(0, DV)[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    output = tl.arange(0, WIDTH)
    weight += output[None, :] * (D + DV)
    y = tl.dot(key, tl.load(weight + tl.arange(0, D)[:, None]), input_precision=PRECISION)
    y = tl.dot(value, tl.load(weight + D + tl.arange(0, DV)[:, None]), y, input_precision=PRECISION)
    y = gelu(y + tl.load(bias + output)[None, :])
    numbers += (batch * tokens + row) * (2 * KV_HEADS) + 2 * kv_head
    largest = tl.load(numbers, mask=inside, other=0.0) + tl.sum(y * tl.load(last + output)[None, :], 1)
    summed = tl.load(numbers + 1, mask=inside, other=0.0) + tl.sum(y * tl.load(last + WIDTH + output)[None, :], 1)
    score = tl.div_rn(round_even((mix * largest + rest * summed) * resolution), resolution)
    tl.store(out + head * tokens + row, score, mask=inside)


def score_pairs(k: Tensor, v: Tensor, numbers: Tensor, score: ScoreCall) -> Tensor:
    """`score_keys` of what `score_refusal` lets through; `numbers` as `read_texts` makes them."""
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    (batch, kv_heads, tokens, size), w, turn = k.shape, score.weights, Turn.of(score, k.shape[3])
    angles = [x if x is None or not turn.width else x.contiguous() for x in (score.cos, score.sin)]
    steps: list[int] = []
    for x in angles:  # one rotation may be that of all texts
        steps += [0, 0] if x is None else [0 if x.shape[0] == 1 else x.stride(0), x.stride(1)]
    out = torch.empty(batch, kv_heads, tokens, dtype=torch.float32, device=k.device)
    with device_of(k):
        on(score_keys_kernel, (batch * kv_heads, pieces(tokens, ROWS)))(
            k, v, *(either(x, k) for x in angles), numbers.contiguous(),
            *(x.contiguous() for x in (w.read_pair, w.read_pair_bias, w.from_pair)), out,
            *strides(k), *strides(v), *steps, tokens, score.mix, 1 - score.mix, float(score.resolution),
            KV_HEADS=kv_heads, D=size, DV=v.shape[3], WIDTH=w.read_pair.shape[0], FIRST=turn.first, TURNED=turn.width,
            INTERLEAVED=turn.interleaved, ANGLE=turn.angle, PRECISION=precision(torch.float32), ROWS=ROWS, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
