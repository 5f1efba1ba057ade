"""Rotary embedding of queries and keys by halves, in one launch: channel i makes a pair with i + D/2.

A program has a head of a token. Products are rounded to the dtype of the heads, and then their sum, as the families do;
no product is fused with an addition.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats.ops.hybrid.kernels.launch import on, padded


@triton.jit
def turned(x, cos, sin, D: tl.constexpr, BD: tl.constexpr):
    """One head at x, of a token whose angles are at cos and sin."""
    column = tl.arange(0, BD)
    inside = column < D
    second = column >= D // 2
    partner = tl.where(second, column - D // 2, column + D // 2)
    own = tl.load(x + column, mask=inside, other=0.0)
    other = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
    by_cos = own.to(tl.float32) * tl.load(cos + column, mask=inside, other=0.0).to(tl.float32)
    by_sin = tl.where(second, other, -other) * tl.load(sin + column, mask=inside, other=0.0).to(tl.float32)
    return by_cos.to(own.dtype).to(tl.float32) + by_sin.to(own.dtype).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def _turn(
    q, k, cos, sin, q_out, k_out, q_b, q_h, q_n, k_b, k_h, k_n, cos_b, cos_n, sin_b, sin_n, tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid (B N, H + KV)."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch, token = row // tokens, row % tokens
    cos += batch * cos_b + token * cos_n
    sin += batch * sin_b + token * sin_n
    column = tl.arange(0, BD)
    if head < HEADS:
        y = turned(q + batch * q_b + head * q_h + token * q_n, cos, sin, D, BD)
        to = q_out + ((batch * HEADS + head) * tokens + token) * D
        tl.store(to + column, y.to(q_out.dtype.element_ty), mask=column < D)
    else:
        head -= HEADS
        y = turned(k + batch * k_b + head * k_h + token * k_n, cos, sin, D, BD)
        to = k_out + ((batch * KV_HEADS + head) * tokens + token) * D
        tl.store(to + column, y.to(k_out.dtype.element_ty), mask=column < D)


def run_turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See `turn_halves`."""
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    (batch, heads, tokens, size), kv_heads = q.shape, k.shape[1]
    outs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    steps = [step for x in (cos, sin) for step in (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))]
    if q.numel() and k.numel():
        on(_turn, (batch * tokens, heads + kv_heads))(
            q, k, cos, sin, *outs, *q.stride()[:3], *k.stride()[:3], *steps, tokens,
            HEADS=heads, KV_HEADS=kv_heads, D=size, BD=padded(size), num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return outs[0], outs[1]
