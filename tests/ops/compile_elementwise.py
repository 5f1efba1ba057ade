"""Compile the kernels of norms, gated products and rotary embedding: python compile_elementwise.py DTYPE.

As `compile_kernels.py` does.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from compile_kernels import compile_launch  # puts the package there

from lolcats.ops.elementwise import ACTIVATIONS, NORM_FORMS
from lolcats.ops.elementwise.kernels import rows, turn


def run(dtype: torch.dtype) -> list[str]:
    """What is wrong with each launch; empty texts where nothing is."""
    problems: list[str] = []

    def on(kernel: Any, grid: tuple[int, ...]) -> Any:
        del grid
        return lambda *arguments, **named: problems.append(compile_launch(kernel, arguments, named))

    rows.on = turn.on = on  # type: ignore[attr-defined]
    x = torch.empty(3, 576, dtype=dtype)
    for form in NORM_FORMS:
        rows.run_rms_norm(x, x[0], 1e-6, form)
    for size in (64, 16384):
        rows.run_rms_norm(torch.empty(3, size, dtype=dtype), torch.empty(size), 1e-6, NORM_FORMS[0])
    for activation in ACTIVATIONS:
        rows.run_gated_product(x, x, activation)
    for size in (64, 80):
        q = torch.empty(2, 9, 1, size, dtype=dtype)
        turn.run_turn(q, q[:, :3], q[:, 0], q[:, 0])
    return problems


if __name__ == "__main__":
    found = run(getattr(torch, sys.argv[1]))
    print("\n".join(line for line in found if line) or f"{len(found)} launches")
