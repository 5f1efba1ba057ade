"""Compile the kernels of near attention as `compile_kernels.py` does: python compile_near.py DTYPE SIZE CALL.

CALL is "plain" (whole texts, forward and backward, and a step) or "state" (what comes after a state, with padding).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from compile_kernels import compile_launch  # puts the package there

from lolcats.ops.near.blocks import empty_near_state
from lolcats.ops.near.kernels import decode, launch
from lolcats.ops.near.quantize import BITS, PairCodec
from lolcats.ops.near.types import NearSpec


def run(dtype: torch.dtype, size: int, call: str) -> list[str]:
    """Launch with kernels that are compiled and not run."""
    problems: list[str] = []

    def on(kernel: Any, grid: tuple[int, ...]) -> Any:
        del grid
        return lambda *arguments, **named: problems.append(compile_launch(kernel, arguments, named))

    for module in (launch, decode):
        module.on = on  # type: ignore[attr-defined]
    batch, heads, kv_heads, n = 2, 9, 3, 700
    q, k = (torch.empty(batch, n, h, size, dtype=dtype).transpose(1, 2) for h in (heads, kv_heads))
    with_state = call == "state"
    spec = NearSpec(256, 4, 192, softcap=5.0 if with_state else None)
    plan = launch.Plan(spec, batch, heads, kv_heads, n, size, size, dtype)
    before = torch.zeros(batch, kv_heads, plan.blocks, spec.pairs, dtype=torch.int32)
    until = torch.zeros(batch, kv_heads, spec.pairs + n, dtype=torch.int32)
    lengths = torch.zeros(batch, dtype=torch.int64)
    context = launch.Context(before, until, None, None, None, None)
    if with_state:
        held = torch.empty(batch, kv_heads, spec.window + plan.slots, size, dtype=dtype)
        context = launch.Context(before, until, lengths, lengths, held, held)
    x = launch.Operands(q, k, k, torch.empty(heads) if with_state else None)
    saved = launch.run_forward(plan, x, context, not with_state)
    if not with_state:
        launch.run_backward(plan, x, context, saved, torch.empty_like(saved.out), False)
        state = empty_near_state(k, k, spec)
        q, k, score = q[:, :, :1], k[:, :, :1], torch.empty(batch, kv_heads, 1)
        decode.decode_step(q, k, k, state, spec, score, lengths, torch.empty(heads), lengths)
        for bits in BITS:
            codec = PairCodec(bits, torch.zeros(kv_heads, size), torch.ones(kv_heads, size))
            stored = codec.encode(k, k)
            decode.decode_step(q, *stored, codec.encode_state(state), spec, score, lengths, None, lengths, codec)
    return [problem for problem in problems if problem]


if __name__ == "__main__":
    for line in run(getattr(torch, sys.argv[1]), int(sys.argv[2]), sys.argv[3]):
        print(line)
