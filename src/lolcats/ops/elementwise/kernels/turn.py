"""Rotary embedding of queries and keys by halves, in one launch: channel i makes a pair with i + D/2.

A program has some heads of a token, and reads its angles once for them. Products are rounded to the dtype of the heads,
and then their sum, as the families do; no product is fused with an addition.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats.ops.hybrid.kernels.launch import on, padded, pieces

HEADS_OF_A_PROGRAM = 8
"""At most; queries and keys are in programs of their own."""


@triton.jit
def turned(x, out, head, heads, x_h, out_h, cos, sin, D: tl.constexpr, BD: tl.constexpr):
    """Heads [BH] of a token at x, whose angles are at cos and sin, to `out`."""
    column = tl.arange(0, BD)[None, :]
    inside = (column < D) & (head < heads)[:, None]
    second = column >= D // 2
    partner = tl.where(second, column - D // 2, column + D // 2)
    x += head[:, None] * x_h
    own = tl.load(x + column, mask=inside, other=0.0)
    other = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
    by_cos = own.to(tl.float32) * tl.load(cos + column, mask=column < D, other=0.0).to(tl.float32)
    by_sin = tl.where(second, other, -other) * tl.load(sin + column, mask=column < D, other=0.0).to(tl.float32)
    y = by_cos.to(own.dtype).to(tl.float32) + by_sin.to(own.dtype).to(tl.float32)
    tl.store(out + head[:, None] * out_h + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _turn(
    q, k, cos, sin, q_out, k_out, q_b, q_h, q_n, k_b, k_h, k_n, cos_b, cos_n, sin_b, sin_n, tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Grid (B N, ceil(H / BH) + ceil(KV / BH))."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    batch, token = row // tokens, row % tokens
    cos += batch * cos_b + token * cos_n
    sin += batch * sin_b + token * sin_n
    of_queries: tl.constexpr = (HEADS + BH - 1) // BH
    of_head = tl.zeros((), tl.int64) + tokens * D
    if tile < of_queries:
        to = q_out + (batch * HEADS * tokens + token) * D
        head = tile * BH + tl.arange(0, BH)
        turned(q + batch * q_b + token * q_n, to, head, HEADS, q_h, of_head, cos, sin, D, BD)
    else:
        to = k_out + (batch * KV_HEADS * tokens + token) * D
        head = (tile - of_queries) * BH + tl.arange(0, BH)
        turned(k + batch * k_b + token * k_n, to, head, KV_HEADS, k_h, of_head, cos, sin, D, BD)


def run_turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `turn_halves`."""
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    (batch, heads, tokens, size), kv_heads = q.shape, k.shape[1]
    outs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    steps = [step for x in (cos, sin) for step in (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))]
    tiles = pieces(heads, HEADS_OF_A_PROGRAM) + pieces(kv_heads, HEADS_OF_A_PROGRAM)
    if q.numel() and k.numel():
        on(_turn, (batch * tokens, tiles))(
            q, k, cos, sin, *outs, *q.stride()[:3], *k.stride()[:3], *steps, tokens, HEADS=heads, KV_HEADS=kv_heads,
            D=size, BD=padded(size), BH=HEADS_OF_A_PROGRAM, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return outs[0], outs[1]
