"""When the forward pass runs by segments (segment.py), and its launches.

Segments are for what was measured to be faster with them: whole texts of models whose heads have 128 numbers, read
without gradients on a Hopper GPU. All else is `launch.run_forward`'s, which computes the same function.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

from lolcats.ops.devices import capability
from lolcats.ops.hybrid.kernels.launch import Context, Operands, Plan, on

SHORTEST = 2048
"""Tokens of the shortest rows that go by segments."""
LONG = 64
"""Blocks of a segment from which on its sums are found in five pieces rather than two."""
NEEDED = {
    "triton.experimental.gluon": "jit",
    "triton.experimental.gluon.language": "NVMMADistributedLayout NVMMASharedLayout.get_default_for DotOperandLayout "
    "SwizzledSharedLayout BlockedLayout SliceLayout inline_asm_elementwise convert_layout allocate_shared_memory "
    "static_range num_programs warp_specialize(functions_and_args,worker_num_warps,worker_num_regs) "
    "thread_barrier|barrier",
    "triton.experimental.gluon.language.nvidia.hopper": "fence_async_shared warpgroup_mma warpgroup_mma_wait "
    "mbarrier.MBarrierLayout mbarrier.init mbarrier.wait mbarrier.expect mbarrier.arrive tma.store_wait "
    "tma.async_load|tma.async_copy_global_to_shared tma.async_store|tma.async_copy_shared_to_global",
    "triton.experimental.gluon.nvidia.hopper": "TensorDescriptor",
}
"""Modules, and the names that are needed of each: of `a|b` one, `f(x,y)` with these first arguments."""


def refusal(p: Plan, x: Operands, c: Context) -> str | None:
    """Why a forward pass without gradients cannot run by segments, or None."""
    s, device = p.spec, x.q.device
    wrong = {
        "it takes bfloat16": any(t.dtype != torch.bfloat16 for t in (x.q, x.k, x.v)),
        "it takes keys and values of 128 numbers": (p.d, p.dv) != (128, 128),
        "it takes hedgehog maps with 64 columns": p.kind != "hedgehog" or p.width != 64,
        "it takes a window of 64 tokens": s.window != 64,
        "it takes no sinks": s.sinks > 0 or x.sink_logits is not None,
        "it takes no softcap": s.softcap is not None,
        "it takes a scale above 0": s.score_scale(p.d) <= 0,
        "it takes no decay": x.log_decay is not None,
        "it takes no padding, no packed texts and no state before the first token": not (
            c.rows is None and c.initial is None
        ),
        f"it takes rows of {SHORTEST} tokens or more": p.tokens < SHORTEST,
        "it takes addresses and strides that the copy engine takes": not p.tma,
        "it needs compute capability 9": device.type != "cuda" or capability(device)[0] != 9,
    }
    reason = next((reason for reason, found in wrong.items() if found), None)
    return reason or _missing()


@functools.cache
def _missing() -> str | None:
    """What is wrong with this version of Triton."""
    names = missing_names(NEEDED)
    return f"this version of Triton lacks {', '.join(names)}" if names else None


def missing_names(needed: dict[str, str]) -> list[str]:
    """Those of the names that are not there, or whose arguments are others."""
    missing = []
    for module, names in needed.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            missing.append(module)
            continue
        missing += [name for name in names.split() if not any(_has(found, choice) for choice in name.split("|"))]
    return missing


def _has(found: Any, name: str) -> bool:
    name, *arguments = name.rstrip(")").replace("(", ",").split(",")
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not None and (
        not arguments or [*inspect.signature(found).parameters][: len(arguments)] == arguments
    )


def run_segments(p: Plan, x: Operands) -> Tensor:
    """The output [B, H, N, Dv] of a call that `refusal` has nothing against.

    Segments are cut so that there are programs for all multiprocessors, fewer of a text where there are more texts: the
    bits of a row are the same again in a batch of the same shape, and in others differ by rounding.
    """
    from lolcats.ops.hybrid.kernels.segment import described, segment_forward  # it needs what other Tritons lack

    device = x.q.device
    out = torch.empty(p.batch, p.tokens, p.heads, p.dv, dtype=x.v.dtype, device=device).transpose(1, 2)
    groups, segments = p.segments(p.heads)
    blocks = 2 * groups
    q, k, v, result = (described(t, [1, 1, 64, 128]) for t in (x.q, x.k, x.v, out))
    map_q, map_k = (described(t.view(-1, p.width), [128, 64]) for t in (x.map_q, x.map_k))
    before, before_sum = _states(p, k, v, map_k, device, blocks, segments)
    factor = torch.zeros_like(x.window_factor) if x.factor is None else x.factor
    on(segment_forward, (p.heads, segments, p.batch))(
        q, k, v, map_q, map_k, result, x.window_factor, factor, before, before_sum, p.tokens, segments, blocks,
        p.spec.score_scale(p.d), KV_GROUP=p.heads // p.kv_heads, MAP_GROUP=p.heads // p.map_heads,
        TERRACED=p.spec.window_kind == "terraced", num_warps=4,
    )  # fmt: skip
    return out


def _states(
    p: Plan, k: Any, v: Any, map_k: Any, device: torch.device, blocks: int, segments: int
) -> tuple[Tensor, Tensor]:
    """The state before each segment: [B, map heads, segments, F Dv] bf16 and [B, map heads, segments, F] fp32."""
    from lolcats.ops.hybrid.kernels.segment import MOST_PIECES, scan_pieces, sum_pieces  # as above

    split = MOST_PIECES.value if blocks >= LONG else 2
    pieces = (segments - 1) * split
    shape = p.batch, p.map_heads
    sums = torch.empty(*shape, pieces, p.f * (p.dv + 1), device=device)
    before = torch.empty(*shape, segments, p.f * p.dv, dtype=torch.bfloat16, device=device)
    before_sum = torch.empty(*shape, segments, p.f, device=device)
    if pieces:
        on(sum_pieces, (p.map_heads, pieces, p.batch))(
            k, v, map_k, sums, blocks, split, KV_GROUP=p.map_heads // p.kv_heads, num_warps=4, maxnreg=128
        )
    on(scan_pieces, (p.batch * p.map_heads, -(-sums.shape[-1] // 512)))(
        sums, before, before_sum, segments, split, MOST=MOST_PIECES.value, BLOCK=512, num_warps=4
    )
    return before, before_sum
