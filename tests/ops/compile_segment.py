"""Compile the kernels of segment.py for compute capability 9.0, without a GPU; print what fails.

As compile_kernels.py, whose compiler it takes. Run as a program: python compile_segment.py.
"""

from __future__ import annotations

import torch
from compile_kernels import Compiler  # puts the package there

from lolcats.ops.hybrid.kernels import launch, segment_launch
from lolcats.ops.types import HybridSpec

KERNELS = ["scan_pieces", "segment_forward", "sum_pieces"]


def run() -> list[str]:
    """What is wrong with the kernels, for both kinds of windows, a state of each query head and of each key head."""
    compiler = Compiler()
    segment_launch.on = compiler  # type: ignore[attr-defined]
    problems: list[str] = []
    for map_heads, window_kind in ((4, "sliding"), (2, "terraced")):
        compiler.dry = False
        launch_all(700, map_heads, window_kind)
        problems += compiler.problems
        compiler.dry, compiler.problems, known = True, [], set(compiler.kernels)
        for n in (1, 64, 100, 704, 3000, 20_000, 32_768):
            launch_all(n, map_heads, window_kind)
        problems += compiler.again(known)
    made = sorted({key.split(";")[0] for key in compiler.kernels})
    return problems if made == KERNELS else [*problems, f"launched were only {made}"]


def launch_all(n: int, map_heads: int, window_kind: str) -> None:
    """Launch all for texts of n tokens."""
    batch, heads, kv_heads, size = 2, 4, 2, 128
    q, k = (torch.empty(batch, n, h, size, dtype=torch.bfloat16).transpose(1, 2) for h in (heads, kv_heads))
    map_q, map_k = (torch.empty(h, size, 64, dtype=torch.bfloat16) for h in (heads, map_heads))
    x = launch.Operands(q, k, k, map_q, map_k, torch.empty(heads), factor=torch.empty(heads))
    plan = launch.make_plan(x, launch.Context(), HybridSpec(64, window_kind), "hedgehog")
    segment_launch.run_segments(plan, x)


if __name__ == "__main__":
    for line in run():
        print(line)
