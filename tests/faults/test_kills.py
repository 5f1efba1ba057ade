"""What is killed at random moments goes on to the same bytes; `make test-faults` does it three hundred times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills() -> None:
    script = Path(__file__).with_name("kills.py")
    env = os.environ | {"PYTHONPATH": str(script.parents[2] / "src")}
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "20", "--seed", "3"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout.splitlines()[-1]
