"""Jobs end with their sweep, however it ends, and the next call does not run beside them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import forked
from lolcats import LolcatsError
from lolcats.sweep import Sweep, attached, hold_job, run_sweep
from lolcats.sweep.runner import wait_for_jobs

pytestmark = pytest.mark.skipif(os.name != "posix", reason="looks at processes as POSIX has them")
LOAD = f"""
import importlib.util, subprocess, sys, time
spec = importlib.util.spec_from_file_location("attached", {attached.__file__!r})
attached = importlib.util.module_from_spec(spec)
spec.loader.exec_module(attached)
"""
CHILD = (
    LOAD
    + """
attached.end_with_parent()
assert sys.stdin.read() == ""
own = subprocess.Popen(["sleep", "600"])
print("ready", own.pid, flush=True)
own.wait()
"""
)
PARENT = (
    LOAD
    + """
child = attached.start_attached([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline().decode().split()[1], flush=True)
time.sleep(600)
"""
)


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_child_and_its_own_end_with_the_parent(number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    family = [int(word) for word in parent.stdout.readline().split()]
    assert len(family) == 2 and all(map(lives, family))
    parent.send_signal(number)
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: not any(map(lives, family)), 60)


def test_what_a_job_leaves_ends_with_it() -> None:
    process = attached.start_attached([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
    assert process.stdout is not None
    own = int(process.stdout.readline().split()[1])
    os.kill(process.pid, signal.SIGKILL)
    attached.finish(process)
    process.stdout.close()
    assert wait_until(lambda: not lives(own), 60)


def test_the_next_call_waits_for_a_job_or_refuses(make_sweep: Callable[..., Sweep]) -> None:
    sweep = make_sweep(grid={"seed": [0, 1]})
    said: list[str] = []
    ready, end = threading.Event(), threading.Event()

    def job() -> None:
        with hold_job(sweep, "seed-1"):
            ready.set()
            end.wait(30)

    thread = threading.Thread(target=job)
    thread.start()
    try:
        assert ready.wait(30)
        with pytest.raises(LolcatsError, match=r"an earlier call still works on seed-1 in .*; wait for it, or end it"):
            wait_for_jobs(sweep, said.append, patience=0.3)
        with pytest.raises(LolcatsError, match=r"another process works on seed-1"), hold_job(sweep, "seed-1"):
            pass
        threading.Timer(0.3, end.set).start()
        wait_for_jobs(sweep, said.append)
    finally:
        end.set()
        thread.join()
    assert said == ["waiting for a process of an earlier call, which works on seed-1"] * 2


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_job(
    sweep_file: Callable[..., Path], make_sweep: Callable[..., Sweep], tmp_path: Path
) -> None:
    """The real command line; afterwards the same sweep is finished by another call."""
    tokens = {"transfer": {"tokens": 960_000, "batch_size": 4, "checkpoint_every": 100}}
    file = sweep_file(tokens, grid={"seed": [0, 1]})
    env = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONWARNINGS": "", "OMP_NUM_THREADS": "1"}
    words = ["-m", "lolcats.cli", "sweep", str(file), "--jobs", "2"]
    sweep = make_sweep(tokens, grid={"seed": [0, 1]})
    parent = forked.start(words, tmp_path, env)
    begun = [Path(sweep.folder) / run.name / "metrics.jsonl" for run in sweep.runs]
    assert wait_until(lambda: all(path.exists() for path in begun), 200), (tmp_path / "out").read_text()
    jobs = [int(word) for word in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    assert len(jobs) == 2 and all(map(lives, jobs))
    parent.kill()
    parent.join()
    assert wait_until(lambda: not any(map(lives, jobs)), 60)
    wait_for_jobs(sweep, print, patience=60)  # of a dead process the threads may end last, and with them its locks
    short = make_sweep(grid={"seed": [0, 1]})
    table = run_sweep(short, file, overwrite=["*"])
    assert [row.status for row in table.runs] == ["finished"] * 2
