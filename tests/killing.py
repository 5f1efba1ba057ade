"""Processes that are killed while they write, and training that stops in the middle as if its own were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from lolcats.training import Reporter

KILLED = """
import os, signal, sys
from pathlib import Path
import bare
from lolcats.files import atomic_file, atomic_folder
place = Path(sys.argv[1])
with (atomic_folder if sys.argv[2] == "folder" else atomic_file)(place) as temporary:
    ((temporary / "half") if sys.argv[2] == "folder" else temporary).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
TESTS = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])}


def kill_while_writing(place: Path, kind: str) -> None:
    """Have a process begin a "file" or a "folder" at `place`, and kill it in the middle."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(place), kind], env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL


class Killed(BaseException):
    """What a killed process looks like from inside."""


class Killer(Reporter):
    """Raises after the given step."""

    def __init__(self, path: Path | None, at: int) -> None:
        super().__init__(path)
        self.at = at

    def step(self, bar: Any, stage: str, step: int, *args: Any, **kwargs: Any) -> None:
        super().step(bar, stage, step, *args, **kwargs)
        if step == self.at:
            raise Killed
