"""`PairCodec.coded` in one kernel: keys and values of a text as attention sees them, and their bytes.

A program has ROWS tokens of one key head in registers, their keys or their values: they are scaled, mixed, coded, and
read back from the code. In torch these are some 50 operations over as many copies in float32.

Legend: B batch, KV key heads, N tokens, D key size, Dv value size.
Bytes: k and v once read; what attention sees once written, and its bytes where they are wanted.
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
from lolcats.ops.hybrid.kernels.launch import either, on, pieces, strides
from lolcats.ops.near.kernels.codes import code_rows, read_map, scales_on, store_rows
from lolcats.ops.near.kernels.spread import LARGEST, mixed_rows
from lolcats.ops.near.types import STEP_BYTES, Coded

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, WARPS = 4, 1
"""Of a program: sums of a row stay in a warp, without a barrier."""


@triton.jit
def code_keys(
    k, key_map, scales, k_out, keys, row, written, inside, kv_head, k_n, k_root, KV_HEADS: tl.constexpr,
    D: tl.constexpr, D_LEVELS: tl.constexpr, STORE: tl.constexpr, BY_INVERSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Keys as they are read again, and their bytes; channels in the order of the map."""
    order, scale = read_map(key_map, scales, kv_head, KV_HEADS, D)
    x = tl.load(k + row[:, None] * k_n + order[None, :], mask=inside[:, None], other=0.0)
    code, step = code_rows(mixed_rows(x.to(tl.float32) * scale[None, :], D, D_LEVELS, ROWS) * k_root, BY_INVERSE)
    if STORE:
        store_rows(keys, written, code, step, inside, D)
    x = mixed_rows((code - 127.5) * step.to(tl.float32)[:, None], D, D_LEVELS, ROWS) * k_root
    to = k_out + written[:, None] * D + order[None, :]
    tl.store(to, tl.div_rn(x, scale[None, :]).to(k_out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def code_values(
    v, v_out, values, row, written, inside, v_n, v_root,
    DV: tl.constexpr, DV_LEVELS: tl.constexpr, STORE: tl.constexpr, BY_INVERSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The same of values, which have no map."""
    column = tl.arange(0, DV)[None, :]
    x = tl.load(v + row[:, None] * v_n + column, mask=inside[:, None], other=0.0)
    code, step = code_rows(mixed_rows(x.to(tl.float32), DV, DV_LEVELS, ROWS) * v_root, BY_INVERSE)
    if STORE:
        store_rows(values, written, code, step, inside, DV)
    x = mixed_rows((code - 127.5) * step.to(tl.float32)[:, None], DV, DV_LEVELS, ROWS) * v_root
    tl.store(v_out + written[:, None] * DV + column, x.to(v_out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["tokens"])
def code_pairs_kernel(
    k, v, key_map, scales, k_out, v_out, keys, values, k_b, k_h, k_n, v_b, v_h, v_n, tokens, k_root, v_root,
    KV_HEADS: tl.constexpr, D: tl.constexpr, D_LEVELS: tl.constexpr, DV: tl.constexpr, DV_LEVELS: tl.constexpr,
    STORE: tl.constexpr, BY_INVERSE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (B KV, N / ROWS, 2): keys, then values; a function each, as a name has one shape in both branches."""
    head = tl.program_id(0).to(tl.int64)
    batch, kv_head = head // KV_HEADS, head % KV_HEADS
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < tokens
    written = head * tokens + row
    if tl.program_id(2) == 0:
        code_keys(
            k + batch * k_b + kv_head * k_h, key_map, scales, k_out, keys, row, written, inside, kv_head, k_n, k_root,
            KV_HEADS, D, D_LEVELS, STORE, BY_INVERSE, ROWS,
        )  # fmt: skip
    else:
        code_values(
            v + batch * v_b + kv_head * v_h, v_out, values, row, written, inside, v_n, v_root,
            DV, DV_LEVELS, STORE, BY_INVERSE, ROWS,
        )  # fmt: skip


def codes_pairs(k: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes keys and values of these sizes and dtypes."""
    sizes = k.shape[3], v.shape[3]
    fits = all(2 <= n <= LARGEST and n & (n - 1) == 0 for n in sizes)
    return fits and k.dtype in DTYPES and v.dtype in DTYPES and k.shape[:3] == v.shape[:3] and k.numel() > 0


def code_pairs(k: Tensor, v: Tensor, key_map: Tensor, store: bool) -> Coded:
    """`PairCodec.coded` with 8 bits of what `codes_pairs` lets through, without gradients.

    Args:
        k: [B, KV, N, D]; v: [B, KV, N, Dv].
        key_map: of the codec.
        store: also give the bytes.
    """
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    (batch, kv_heads, tokens, size), dv = k.shape, v.shape[3]
    seen = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v)]
    stored: list[Tensor | None] = [None, None]
    if store:
        stored = [torch.empty(*k.shape[:3], n + STEP_BYTES, dtype=torch.uint8, device=k.device) for n in (size, dv)]
    with device_of(k):
        on(code_pairs_kernel, (batch * kv_heads, pieces(tokens, ROWS), 2))(
            k, v, key_map.contiguous(), scales_on(k.device), *seen, *(either(x, k) for x in stored),
            *strides(k), *strides(v), tokens, size**-0.5, dv**-0.5,
            KV_HEADS=kv_heads, D=size, D_LEVELS=size.bit_length() - 1, DV=dv, DV_LEVELS=dv.bit_length() - 1,
            STORE=store, BY_INVERSE=k.is_cuda, ROWS=ROWS, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return Coded(*seen, *stored)
