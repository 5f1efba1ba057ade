"""Compile the kernels of near attention as `compile_kernels.py` does: python compile_near.py DTYPE SIZE CALL.

Each is compiled once: that heads of another window and other pairs take the same ones is a part of what is checked.

CALL is "plain" (whole texts, forward and backward, and a step), "state" (what comes after a state, with padding) or
"given" (the attention that later queries give each key).
"""

from __future__ import annotations

import sys

import torch
from compile_kernels import Compiler  # puts the package there

from lolcats.ops.near.blocks import empty_near_state
from lolcats.ops.near.kernels import decode_launch, given, launch, select, spread
from lolcats.ops.near.quantize import BITS, PairCodec, plain_map
from lolcats.ops.near.types import NearPart, NearSpec, NearState


def run(dtype: torch.dtype, size: int, call: str) -> list[str]:
    """What is wrong with the kernels of a model whose heads differ."""
    compiler = Compiler()
    for module in (launch, decode_launch, given, select, spread):
        module.on = compiler  # type: ignore[attr-defined]
    if call == "given":
        launch_given(dtype, size, 700)
        known = set(compiler.kernels)
        launch_given(dtype, size, 801)
    else:
        capped = 5.0 if call == "state" else None
        launch_all(dtype, size, NearSpec(256, 4, 192, softcap=capped))
        for rows in (1, 1000):
            spread.spread_rows(torch.empty(rows, 1 << (size - 1).bit_length()))
        known = set(compiler.kernels)
        launch_all(dtype, size, NearSpec(1, 4, 177, softcap=capped), n=801)
    return compiler.problems + compiler.again(known)


def launch_all(dtype: torch.dtype, size: int, spec: NearSpec, n: int = 700) -> None:
    """Launch what there is for a text of n tokens; after a state, with padding, if there is a softcap."""
    batch, heads, kv_heads, with_state = 2, 9, 3, spec.softcap is not None
    q, k = (torch.empty(batch, n, h, size, dtype=dtype).transpose(1, 2) for h in (heads, kv_heads))
    plan = launch.Plan(spec, batch, heads, kv_heads, n, size, size, dtype)
    before = torch.zeros(batch, kv_heads, plan.blocks, spec.pairs, dtype=torch.int32)
    until = torch.zeros(batch, kv_heads, spec.pairs + n, dtype=torch.int32)
    lengths = torch.zeros(batch, dtype=torch.int64)
    context = launch.Context(before, until, None, None, None, None)
    if with_state:
        held = torch.empty(batch, kv_heads, spec.window + plan.slots, size, dtype=dtype)
        context = launch.Context(before, until, lengths, lengths, held, held)
    x = launch.Operands(q, k, k, torch.empty(heads) if with_state else None)
    saved = launch.run_forward(plan, x, context, not with_state, q.contiguous() if with_state else None)
    if with_state:
        saved = launch.run_forward(plan, x, context, True)
        launch.run_backward(plan, x, context, saved, torch.empty_like(saved.out), True)
    else:
        scores = torch.zeros(batch, kv_heads, spec.pairs + n)
        for way in (select._select_short, select._select_long):
            way(scores, spec.pairs, launch.BLOCK)
        launch.run_backward(plan, x, context, saved, torch.empty_like(saved.out), False)
        state = empty_near_state(k, k, spec)
        q, k, score = q[:, :, :1], k[:, :, :1], torch.empty(batch, kv_heads, 1)
        decode_launch.decode_step(q, k, k, parts(state, spec), score, lengths, torch.empty(heads), lengths)
        far = spec._replace(reach=8192)
        decode_launch.decode_step(q, k, k, parts(state, far), score, lengths, torch.empty(heads), lengths, sink_q=q)
        for bits in BITS:
            codec = PairCodec(bits, plain_map(kv_heads, size))
            stored = codec.encode(k, k)
            decode_launch.decode_step(
                q, *stored, parts(codec.encode_state(state), spec), score, lengths, None, lengths, codec
            )


def parts(state: NearState, spec: NearSpec) -> list[NearPart]:
    """All key heads of a state."""
    return [NearPart(spec, state, tuple(range(state.ring.k.shape[1])))]


def launch_given(dtype: torch.dtype, size: int, n: int) -> None:
    """Launch the kernels of `given`, plain and with all that a family may add."""
    q, k = (torch.empty(2, n, heads, size, dtype=dtype).transpose(1, 2) for heads in (9, 3))
    windows = torch.empty(3, dtype=torch.int32)
    given.far_weights(q, k, windows, 0.125, None, None, 1e-4)
    given.far_weights(q, k, windows, 0.125, 5.0, torch.empty(9), 1e-4)


if __name__ == "__main__":
    for line in run(getattr(torch, sys.argv[1]), int(sys.argv[2]), sys.argv[3]):
        print(line)
