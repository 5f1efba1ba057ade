"""What the layer's input says of the keys of texts: `read_hidden_kernel` and `hidden_numbers` do it for one of each.

A program has ROWS tokens and reads their channels once, in slices: a product with the first matrix, mean, and sum of
squares. In torch the input is copied to float32, normalized there, and multiplied without tensor cores.

Normalization comes after the product, as W (x - m) r = r (W (x - p) - (m - p) W 1). The pivot p is the mean of a row's
first slice: near m, so that little is lost in the difference where numbers are large.

Products are as exact as those of float32. Numbers of bfloat16 are multiplied with three bfloat16 parts of each weight,
whose sum is the weight and whose products float32 holds; p is taken off afterwards, slice by slice. From others p is
taken off first, and their products are three of tf32. Tensor cores cut off digits when they add up, so they do that
within a slice only; slices are added up by usual additions.

No sum depends on how many tokens there are, nor on those beside one, and no product is fused with a sum, which a
compiler may do in one row of a tile and not in another; so a token has the same numbers in every batch.

Legend: B batch, KV key heads, N tokens, R width of the hidden part.
Bytes: the input once read, the matrix once for each program (the cache has it), 2 KV numbers of a token written.
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
from lolcats.ops.hybrid.kernels.launch import on, pieces, precision
from lolcats.ops.near.kernels.prepare import EPS, gelu
from lolcats.ops.near.prepared import ScoreWeights

ROWS, SLICE = 64, 32
"""Tokens of a program, and channels that it has at once: with 64 of these registers overflow."""


@triton.jit
def bfloat16_parts(w):
    """Three numbers of bfloat16 whose sum is w, of float32."""
    first = w.to(tl.bfloat16)
    rest = w - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    return first, second, third


@triton.jit
def products_about(x, off, pivot, w, sums, PRECISION: tl.constexpr):
    """(x - pivot) w^T of x [ROWS, SLICE] and w [R, SLICE] of float32; of parts the smallest products come first.

    Args:
        off: x - pivot in float32, 0 beside the channels.
        sums: of the rows of w, [R].
    """
    if x.dtype == tl.bfloat16:
        first, second, third = bfloat16_parts(w)
        y = tl.dot(x, tl.trans(third))
        y = tl.dot(x, tl.trans(second), y)
        y = tl.dot(x, tl.trans(first), y)
        y -= pivot[:, None] * sums[None, :]
    else:
        y = tl.dot(off, tl.trans(w), input_precision=PRECISION)
    return y


@triton.jit
def join_moments(mean, squares, x, before, known, SIZE: tl.constexpr, SLICE: tl.constexpr):
    """Mean and sum of squares about it of rows, of `before` channels, with a slice x [ROWS, SLICE] more."""
    count = tl.minimum(SIZE - before, SLICE)
    own = tl.sum(x, 1) / count
    off = tl.where(known[None, :], x - own[:, None], 0.0)
    apart, share = own - mean, count / (before + count)
    return mean + apart * share, squares + tl.sum(off * off, 1) + apart * apart * (before * share)


@triton.jit(do_not_specialize=["rows", "tokens"])
def read_texts_kernel(
    hidden, weight, bias, last, last_bias, out, hidden_b, hidden_n, rows, tokens,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (B N / ROWS,). `rows`: B N. `out`: [B, N, OUTPUTS], where OUTPUTS is 2 KV."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    from_row = hidden + (row // tokens).to(tl.int64) * hidden_b + (row % tokens).to(tl.int64) * hidden_n
    output = tl.arange(0, WIDTH)
    channel = tl.arange(0, SLICE)
    known = channel < SIZE
    x = tl.load(from_row[:, None] + channel[None, :], mask=inside[:, None] & known[None, :], other=0.0)
    pivot = tl.sum(x.to(tl.float32), 1) / min(SIZE, SLICE)
    y = tl.zeros([ROWS, WIDTH], tl.float32)
    of_one = tl.zeros([WIDTH], tl.float32)
    mean = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, SIZE, SLICE):
        at = start + channel
        known = at < SIZE
        x = tl.load(from_row[:, None] + at[None, :], mask=inside[:, None] & known[None, :], other=0.0)
        w = tl.load(weight + output[:, None] * SIZE + at[None, :], mask=known[None, :], other=0.0)
        off = tl.where(known[None, :], x.to(tl.float32) - pivot[:, None], 0.0)
        sums = tl.sum(w, 1)
        y += products_about(x, off, pivot, w, sums, PRECISION)
        of_one += sums
        mean, squares = join_moments(mean, squares, off, start, known, SIZE, SLICE)
    y = (y - mean[:, None] * of_one[None, :]) / tl.sqrt(squares / SIZE + EPS)[:, None]
    y = gelu(y + tl.load(bias + output)[None, :])
    to = out + row.to(tl.int64) * OUTPUTS
    for number in range(OUTPUTS):
        of_number = tl.sum(y * tl.load(last + number * WIDTH + output)[None, :], 1) + tl.load(last_bias + number)
        tl.store(to + number, of_number, mask=inside)


def read_texts(hidden: Tensor, weights: ScoreWeights) -> Tensor:
    """What the layer's input [B, N, d_model] says of each key head: [B, N, 2 KV] float32."""
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    (batch, tokens, size), w = hidden.shape, weights
    out = torch.empty(batch, tokens, w.from_hidden.shape[0], dtype=torch.float32, device=hidden.device)
    with device_of(hidden):
        on(read_texts_kernel, (pieces(batch * tokens, ROWS),))(
            hidden, *(x.contiguous() for x in (w.read_hidden, w.read_hidden_bias, w.from_hidden, w.from_hidden_bias)),
            out, hidden.stride(0), hidden.stride(1), batch * tokens, tokens,
            SIZE=size, WIDTH=w.read_hidden.shape[0], OUTPUTS=out.shape[2], ROWS=ROWS, SLICE=SLICE,
            PRECISION=precision(torch.float32), num_warps=8, num_stages=3,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
