"""What is killed at random moments goes on to the same bytes; `make test-faults` does it hundreds of times."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import forked

SHARE = ["linearize", "export merged", "blocks, one after the other", "blocks, a job each"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Twenty kills, of the commands whose kinds the others have too; three of each, so that few runs are finished."""
    script = str(Path(__file__).with_name("kills.py"))
    words = ["--kills", "20", "--seed", "3", "--each", "3", "--only", *SHARE]
    process = forked.start([script, *words], tmp_path, dict(os.environ))
    process.join()
    said = (tmp_path / "out").read_text()
    assert process.exitcode == 0, said
    found = re.search(r"^(\d+) kills.* in (\d+) trials .*: 0 failed$", said, re.M)
    assert found is not None and int(found[1]) >= 20 and int(found[2]) >= len(SHARE), said
