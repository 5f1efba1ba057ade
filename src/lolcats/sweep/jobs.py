"""Several runs side by side, each `lolcats linearize` in a process of its own with a log file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from lolcats.run_folder import RunFolder
from lolcats.sweep.settings import Sweep, SweepRun
from lolcats.sweep.sharing import stage_one, stage_one_is_done, take_stage_one
from lolcats.sweep.state import run_status

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 20.0
"""How long a process may take to end after Ctrl-C before it is killed."""


@dataclass
class _Job:
    run: SweepRun
    process: subprocess.Popen[bytes]
    slot: int
    log: Path
    begin: int
    """Bytes of the log that are from earlier calls."""
    started: float


def run_jobs(
    sweep: Sweep,
    todo: Sequence[SweepRun],
    jobs: int,
    *,
    share: bool,
    ended: Callable[[SweepRun, str], None],
    say: Callable[[str], None],
) -> None:
    """Do `todo`, `jobs` at a time; several GPUs are taken in turn. An interruption ends all processes.

    Args:
        share: do a stage 1 that several runs have in common once; the others wait for it.
        ended: called with each run that ended and its error in one line ("" for none).
        say: where progress is shown.
    """
    waiting, running = list(todo), list[_Job]()
    logs = sweep.folder / "logs"
    logs.mkdir(exist_ok=True)
    with _termination_interrupts():
        try:
            while waiting or running:
                for job in [job for job in running if job.process.poll() is not None]:
                    running.remove(job)
                    seconds = time.monotonic() - job.started
                    say(f"{job.run.name} ended after {seconds:,.0f} s; {len(waiting) + len(running)} left")
                    ended(job.run, _error(job))
                while len(running) < jobs and (run := _next(waiting, [job.run for job in running], share)):
                    waiting.remove(run)
                    slot = min(set(range(jobs)) - {job.slot for job in running})
                    running.append(_start(run, sweep, slot, jobs, share, say))
                time.sleep(POLL_SECONDS)
        finally:
            _stop(running)


def _next(waiting: Sequence[SweepRun], running: Sequence[SweepRun], share: bool) -> SweepRun | None:
    """The first run that need not wait for the stage 1 of one that is running."""
    busy = {stage_one(run.config) for run in running if share and not stage_one_is_done(run.config)} - {""}
    return next((run for run in waiting if stage_one(run.config) not in busy), None)


def _start(run: SweepRun, sweep: Sweep, slot: int, jobs: int, share: bool, say: Callable[[str], None]) -> _Job:
    origin = take_stage_one(run, sweep.runs) if share else None
    folder = RunFolder.of(run.config)
    folder.prepare(run.config, resume=True)
    log = sweep.folder / "logs" / f"{run.name}.log"
    command = [sys.executable, "-m", "lolcats.cli", "linearize", str(folder.config_file), "--resume"]
    note = f", stage 1 is that of {origin}" if origin else ""
    say(f"{run.name} runs (log: {log}{note})")
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            command, env=_environment(slot, jobs), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    return _Job(run, process, slot, log, begin, time.monotonic())


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """Of a job: one GPU of those that this process sees, and its share of the processor's cores."""
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    if (count := torch.cuda.device_count()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        env["CUDA_VISIBLE_DEVICES"] = visible[slot % count]
    return env


def _error(job: _Job) -> str:
    """Why a process ended, "" if its run is finished."""
    if run_status(job.run) == "finished":
        return ""
    lines = job.log.read_bytes()[job.begin :].decode(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    code = job.process.returncode
    end = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return errors[-1] if errors else f"{end}; see {job.log}"


def _stop(running: Sequence[_Job]) -> None:
    """Interrupt the processes as Ctrl-C would, and kill those that do not end."""
    for job in running:
        job.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + PATIENCE_SECONDS
    for job in running:
        try:
            job.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Let SIGTERM end the sweep as Ctrl-C does, so that no process is left behind on a GPU."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
