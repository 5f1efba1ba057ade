"""What kernels of the codec of pairs have in common: the map of keys, codes of rows, and their bytes.

All is done by the additions of `PairCodec` in their order, divisions are rounded correctly, and kernels that call these
are compiled without `enable_fp_fusion`, so bytes are those of the form in torch.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
# pyright: reportAssignmentType=false
# Triton's language is not Python: its types are not what a checker of Python takes them for.

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lolcats.ops.near.types import OCTAVE

OCTAVES = 16
"""`measure_keys` gives no larger scale than 2 to this, and no smaller one than 2 to minus this."""
LARGEST_SCALE = tl.constexpr(OCTAVES * OCTAVE)


@triton.jit
def round_even(x):
    """The nearest whole number, of two the even one: what float32 cannot hold of x + 2^23 is rounded so."""
    size = tl.abs(x)
    whole = (size + 8388608.0) - 8388608.0
    return tl.where(size < 8388608.0, tl.where(x < 0, -whole, whole), x)


@triton.jit
def code_rows(y, BY_INVERSE: tl.constexpr):
    """Codes of spread numbers y [ROWS, N] and the step of each row as float16; not a number where y is none."""
    every: tl.constexpr = tl.PropagateNan.ALL
    largest = tl.max(tl.abs(y), 1)
    if BY_INVERSE:
        step = largest * (1.0 / 127.5)
    else:
        step = tl.div_rn(largest, 127.5)
    step = tl.minimum(tl.maximum(step, 1e-7, propagate_nan=every), 6e4, propagate_nan=every).to(tl.float16)
    code = round_even(tl.div_rn(y, step.to(tl.float32)[:, None]) + 127.5)
    return tl.minimum(tl.maximum(code, 0.0), 255.0), step


@triton.jit
def store_rows(to, row, code, step, inside, N: tl.constexpr):
    """The bytes of codes [ROWS, N] and steps [ROWS], rows of N + 2 bytes at `to`."""
    to += row * (N + 2)
    tl.store(to[:, None] + tl.arange(0, N)[None, :], code.to(tl.int32).to(tl.uint8), mask=inside[:, None])
    bits = step.to(tl.int16, bitcast=True).to(tl.int32)
    tl.store(to + N, (bits & 255).to(tl.uint8), mask=inside)
    tl.store(to + N + 1, ((bits >> 8) & 255).to(tl.uint8), mask=inside)


@triton.jit
def read_map(key_map, scales, kv_head, KV_HEADS: tl.constexpr, D: tl.constexpr):
    """The channels of a key head in their order, and the scale of each: [D]."""
    order = tl.load(key_map + kv_head * D + tl.arange(0, D)).to(tl.int32)
    octave = tl.load(key_map + (KV_HEADS + kv_head) * D + order).to(tl.int32)
    octave = tl.minimum(tl.maximum(octave, -LARGEST_SCALE), LARGEST_SCALE)
    return order, tl.load(scales + LARGEST_SCALE + octave)


@functools.cache
def scales_on(device: torch.device) -> Tensor:
    """Every scale that a map of keys may give, [2 `LARGEST_SCALE` + 1]: by torch, whose last bit others may not have.

    It is made once, and for good: a step that was recorded as a CUDA graph may read it.
    """
    numbers = torch.arange(-OCTAVES * OCTAVE, OCTAVES * OCTAVE + 1, dtype=torch.float32, device=device)
    return (numbers / OCTAVE).exp2()
