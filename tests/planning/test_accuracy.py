"""What is computed lies within 15 percent of what was measured, memory within 2; what does not is named."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from lolcats.planning.hardware import GPUS
from lolcats.planning.work import Work, seconds_of


def benchmark() -> Any:
    """The script that prints the table of docs/scale.md."""
    file = Path(__file__).parents[2] / "benchmarks" / "plan.py"
    spec = importlib.util.spec_from_file_location("plan_benchmark", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_all_that_was_measured() -> None:
    found = list(benchmark().comparisons())
    known = [each for each in found if each.what in each.row.get("outside", ())]
    assert (len(found), len(known)) == (38, 5)
    for each in found:
        limit = 0.02 if each.what.endswith("peak") else 0.15
        assert (abs(each.error) <= limit) == (each not in known), (each.row, each.what, each.computed)


def test_a_piece_of_work_is_bound_by_the_slower_side() -> None:
    gpu = GPUS["h100"]
    idle = Work("matmul", flops=1e15, kernels=0)
    busy = Work("matmul", flops=1e15, bytes=1e13, kernels=0)
    assert busy.seconds(gpu) > idle.seconds(gpu) == pytest.approx(1e15 / (0.75 * 989e12))
    assert busy.seconds(gpu) == Work("bytes", bytes=1e13, kernels=0).seconds(gpu)
    assert Work("bytes", bytes=1e13).times(3).seconds(gpu) == pytest.approx(3 * Work("bytes", bytes=1e13).seconds(gpu))


def test_python_is_the_limit_of_small_work_without_graphs() -> None:
    gpu, small, large = GPUS["h100"], [Work("matmul", 1e6)] * 100, [Work("matmul", 1e15)]
    assert seconds_of(small, gpu, graph=False) > 5 * seconds_of(small, gpu, graph=True)
    assert seconds_of(large, gpu, graph=False) == seconds_of(large, gpu, graph=True)
