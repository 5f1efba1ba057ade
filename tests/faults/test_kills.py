"""What is killed at random moments goes on to the same bytes; `make test-faults` does it three hundred times."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import forked


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 4])
def test_every_command_goes_on_after_a_kill(tmp_path: Path, seed: int) -> None:
    """Ten kills of each seed."""
    script = str(Path(__file__).with_name("kills.py"))
    process = forked.start([script, "--kills", "10", "--seed", str(seed)], tmp_path, dict(os.environ))
    process.join()
    said = (tmp_path / "out").read_text()
    assert process.exitcode == 0, said
    found = re.search(r"^(\d+) kills in (\d+) trials .*: 0 failed$", said, re.M)
    assert found is not None and int(found[1]) >= 10 and int(found[2]) >= 7, said  # of seven commands
