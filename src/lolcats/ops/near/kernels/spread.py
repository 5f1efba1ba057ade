"""`quantize.spread` in one kernel: rows times a Hadamard matrix, by the same additions in the same order.

A program has ROWS rows of n numbers in registers, n a power of 2. In each of log2(n) rounds numbers that are
2^level apart become their sum and their difference. No product is followed by an addition, so none is fused with one:
the result has the bits of the form in torch.

Bytes: x once read, the result once written.
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
from lolcats.ops.hybrid.kernels.launch import on, pieces

LARGEST = 512
"""Numbers of a row."""
FEW, MANY = 4, 32
"""Rows of a program, in a decoding step and in a text."""


@triton.jit
def mixed_rows(y, N: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr):
    """Sums of y [ROWS, N], N = 2^LEVELS, as a Hadamard matrix has them, not yet scaled."""
    for level in tl.static_range(LEVELS):
        parts = tl.permute(tl.reshape(y, [ROWS, N // 2 // 2**level, 2, 2**level]), [0, 1, 3, 2])
        one, two = tl.split(parts)
        y = tl.reshape(tl.permute(tl.join(one + two, one - two), [0, 1, 3, 2]), [ROWS, N])
    return y


@triton.jit(do_not_specialize=["rows"])
def spread_kernel(x, out, rows, scale, N: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr):
    """Grid: (rows / ROWS,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * N + tl.arange(0, N)[None, :]
    y = tl.load(x + at, mask=(row < rows)[:, None], other=0.0)
    y = mixed_rows(y, N, LEVELS, ROWS)
    tl.store(out + at, y * scale, mask=(row < rows)[:, None])


def spreads(x: Tensor) -> bool:
    """Whether the kernel takes x [..., n], for which no gradient is wanted."""
    n = x.shape[-1]
    wants = torch.is_grad_enabled() and x.requires_grad
    return x.dtype == torch.float32 and 2 <= n <= LARGEST and n & (n - 1) == 0 and x.numel() > 0 and not wants


def spread_rows(x: Tensor) -> Tensor:
    """x [..., n] of float32, spread."""
    x = x.contiguous()
    n = x.shape[-1]
    count, out = x.numel() // n, torch.empty_like(x)
    rows = FEW if count <= 64 * FEW else MANY
    with device_of(x):
        on(spread_kernel, (pieces(count, rows),))(
            x, out, count, n**-0.5, N=n, LEVELS=n.bit_length() - 1, ROWS=rows, num_warps=1 if rows == FEW else 4,
        )  # fmt: skip
    return out
