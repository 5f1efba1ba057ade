"""Triton's compiler takes every kernel, for every kind of features: no GPU is needed to know that."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")


OFTEN = [("hedgehog", "sliding"), ("t2r", "terraced")]
CASES = [
    pytest.param(*case, marks=pytest.mark.slow if case in OFTEN else pytest.mark.exhaustive)
    for case in itertools.product(("hedgehog", "t2r", "given"), ("sliding", "terraced"))
]


@pytest.mark.parametrize(("kind", "window_kind"), CASES)
def test_kernels_compile(kind: str, window_kind: str, tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tests.parent / "src"), str(tests)])}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), kind, window_kind], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr[-2000:]
