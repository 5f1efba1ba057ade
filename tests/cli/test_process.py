"""The command as a process of its own: exit codes, Ctrl-C, a closed pipe, and what is imported for --help."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
from typer.main import get_command

import forked
from lolcats.cli.app import app

COMMAND = [sys.executable, "-m", "lolcats.cli"]


def test_interrupted_run_says_one_line_and_can_be_resumed(
    arguments: list[str], tmp_path: Path, environment: dict[str, str]
) -> None:
    """Ctrl-C in the middle of training."""
    words = ["-m", "lolcats.cli", *arguments, "name=a", "transfer.tokens=10_000_000"]
    metrics = tmp_path / "runs/a/metrics.jsonl"
    process = forked.start(words, tmp_path, environment, error="err")
    deadline = time.monotonic() + 200
    while process.is_alive() and time.monotonic() < deadline and not metrics.exists():
        time.sleep(0.1)
    time.sleep(0.5)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(200)
    out, err = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    # The last line: libraries may have said something while they were imported.
    assert (process.exitcode, err.splitlines()[-1]) == (130, "interrupted; the last checkpoint is kept")
    assert "Traceback" not in out + err
    assert (tmp_path / "runs/a/checkpoints/transfer/last.safetensors").exists()


@pytest.mark.slow
def test_error_of_a_process(arguments: list[str], tmp_path: Path, environment: dict[str, str]) -> None:
    """Exit code 1 and nothing on stderr but the line, whatever the libraries would like to say."""
    done = subprocess.run(
        [*COMMAND, "linearize", "./nowhere", "device=cpu"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: cannot load './nowhere'")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_closed_pipe_is_no_error(finished: Path, environment: dict[str, str]) -> None:
    """`lolcats inspect ... | head -0`."""
    command = f"{sys.executable} -m lolcats.cli inspect {finished} | true"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stderr == ""


HELP = """
import sys
from lolcats_command import main

code = max(main([*verb, "--help"]) for verb in [[], *([word] for word in sys.argv[1:])])
heavy = {"torch", "transformers", "numpy", "lolcats.config"} & sys.modules.keys()
print(heavy, file=sys.stderr)
sys.exit(code or len(heavy))
"""


def test_help_waits_for_no_library(environment: dict[str, str]) -> None:
    """Of every verb, by the command `lolcats`; `python -m lolcats.cli` imports all of the package."""
    verbs = list(cast(Any, get_command(app)).commands)
    assert len(verbs) > 8
    command = [sys.executable, "-c", HELP, *verbs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
