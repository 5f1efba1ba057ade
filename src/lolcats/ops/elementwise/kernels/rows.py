"""RMS norms, a row a program, and the gated product of an MLP, a block of numbers a program.

Both compute in float32 and round where the modules of transformers do, so that what differs is the order of a sum and
the last bit of an exponential.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats.ops.elementwise.types import NormForm
from lolcats.ops.hybrid.kernels.launch import on, padded, pieces

NUMBERS = 1024
"""Of a program of the gated product."""
A_WARP = 512
"""Numbers of a row that a warp holds in its registers, 16 in each thread."""


@triton.jit
def _rms_norm(x, weight, out, size, eps, BLOCK: tl.constexpr, ADDS_ONE: tl.constexpr, ROUNDS_FIRST: tl.constexpr):
    """Grid (rows,); x, out [rows, D], weight [D]."""
    row = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, BLOCK)
    inside = at < size
    values = tl.load(x + row + at, mask=inside, other=0.0)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS_ONE:
        factor += 1.0
    wide = values.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    if ROUNDS_FIRST:
        wide = wide.to(values.dtype).to(tl.float32)
    tl.store(out + row + at, (factor * wide).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_product(gate, up, out, total, BLOCK: tl.constexpr, GELU: tl.constexpr):
    """Grid (blocks of numbers,); gate, up, out [total]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    values = tl.load(gate + at, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    inner = wide
    if GELU:
        # (1 + tanh(z)) / 2 is the sigmoid of 2 z, and z is torch's sqrt(2 / pi) (x + 0.044715 x^3).
        inner = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)
    small = tl.exp(-tl.abs(inner))  # of the negative number alone: nothing overflows
    sigmoid = tl.where(inner >= 0, 1.0, small) / (1.0 + small)
    active = (wide * sigmoid).to(values.dtype).to(tl.float32)
    other = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (active * other).to(out.dtype.element_ty), mask=inside)


def run_rms_norm(x: Tensor, weight: Tensor, eps: float, form: NormForm) -> Tensor:
    """See `rms_norm`."""
    dtype = torch.promote_types(x.dtype, weight.dtype) if form.rounds_first else x.dtype
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    size = x.shape[-1]
    block = padded(size)
    if x.numel():
        on(_rms_norm, (x.numel() // size,))(
            x, weight, out, size, eps, BLOCK=block, ADDS_ONE=form.adds_one, ROUNDS_FIRST=form.rounds_first,
            num_warps=min(16, max(1, block // A_WARP)),
        )  # fmt: skip
    return out


def run_gated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """See `gated_product`."""
    gate, up = gate.contiguous(), up.contiguous()
    out, total = torch.empty_like(gate), gate.numel()
    if total:
        grid = (pieces(total, NUMBERS),)
        on(_gated_product, grid)(gate, up, out, total, BLOCK=NUMBERS, GELU=activation == "gelu_tanh", num_warps=4)
    return out
