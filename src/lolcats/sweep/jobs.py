"""Several runs side by side, each with its measurements in a process of its own with a log file.

No process outlives the sweep, also not one that is killed (`attached.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch

from lolcats.files import write_text
from lolcats.sweep.attached import finish, start_attached
from lolcats.sweep.job import Job, SweepTeacher, is_finished
from lolcats.sweep.settings import Sweep
from lolcats.sweep.sharing import stage_one, stage_one_is_done, take_stage_one
from lolcats.sweep.state import SWEEP_FILE

POLL_SECONDS = 0.2
NO_MEMORY = ("out of memory", "ALLOC_FAILED", "ended by signal 9")
"""What errors say when a GPU, or this machine, whose kernel then kills a process, has no memory left."""
PATIENCE_SECONDS = 20.0
"""How long a process may take to end after Ctrl-C before it is killed."""


@dataclass
class _Process:
    job: Job
    process: subprocess.Popen[bytes]
    slot: int
    log: Path
    begin: int
    """Bytes of the log that are from earlier calls."""
    started: float


def run_jobs(
    sweep: Sweep,
    todo: Sequence[Job],
    jobs: int,
    *,
    share: bool,
    ended: Callable[[Job, str], None],
    say: Callable[[str], None],
) -> None:
    """Do `todo`, `jobs` at a time; several GPUs are taken in turn. An interruption ends all processes.

    A job that runs out of memory beside others is tried again later, with one job fewer at a time.

    Args:
        todo: runs, and teachers to be measured.
        share: do a stage 1 that several runs have in common once; the others wait for it.
        ended: called with each job that ended and its error in one line ("" for none).
        say: where progress is shown.
    """
    logs = sweep.folder / "logs"
    logs.mkdir(exist_ok=True)
    write_text(logs / SWEEP_FILE, sweep.text)  # the file that was given may lack the overrides
    pool = _Pool(sweep, jobs, share, ended, say, list(todo))
    with _termination_interrupts():
        try:
            while pool.waiting or pool.running:
                pool.collect()
                pool.fill()
                time.sleep(POLL_SECONDS)
        finally:
            _stop(pool.running)


@dataclass
class _Pool:
    sweep: Sweep
    slots: int
    share: bool
    ended: Callable[[Job, str], None]
    say: Callable[[str], None]
    waiting: list[Job]
    running: list[_Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.at_once = self.slots

    def collect(self) -> None:
        """See which processes have ended."""
        for process in [process for process in self.running if process.process.poll() is not None]:
            beside = len(self.running) > 1
            self.running.remove(process)
            finish(process.process)
            seconds = time.monotonic() - process.started
            self.say(f"{process.job.name} ended after {seconds:,.0f} s; {len(self.waiting) + len(self.running)} left")
            error = _error(process)
            if beside and self.at_once > 1 and any(words in error for words in NO_MEMORY):
                self.at_once -= 1
                self.waiting.append(process.job)
                self.say(f"{process.job.name} ran out of memory and is tried again; {self.at_once} jobs at a time now")
            else:
                self.ended(process.job, error)

    def fill(self) -> None:
        """Start as many processes as there may be."""
        while len(self.running) < self.at_once and (job := _next(self.waiting, self._jobs(), self.share)):
            self.waiting.remove(job)
            slot = min(set(range(self.slots)) - {process.slot for process in self.running})
            self.running.append(_start(job, self.sweep, slot, self.slots, self.share, self.say))

    def _jobs(self) -> list[Job]:
        return [process.job for process in self.running]


def _next(waiting: Sequence[Job], running: Sequence[Job], share: bool) -> Job | None:
    """The first job that need not wait for the stage 1 of one that is running."""
    busy = {_stage_one(job) for job in running if share and not stage_one_is_done(job.config)} - {""}
    return next((job for job in waiting if _stage_one(job) not in busy), None)


def _stage_one(job: Job) -> str:
    return "" if isinstance(job, SweepTeacher) else stage_one(job.config)


def _start(job: Job, sweep: Sweep, slot: int, jobs: int, share: bool, say: Callable[[str], None]) -> _Process:
    origin = take_stage_one(job, sweep.runs) if share and not isinstance(job, SweepTeacher) else None
    logs = sweep.folder / "logs"
    log = logs / f"{job.name}.log"
    command = [sys.executable, "-m", "lolcats.cli", "sweep-job", str(logs / SWEEP_FILE), job.name, "--attached"]
    note = f", stage 1 is that of {origin}" if origin else ""
    say(f"{job.name} runs (log: {log}{note})")
    with log.open("ab") as file:
        begin = file.tell()
        process = start_attached(command, env=_environment(slot, jobs), stdout=file, stderr=subprocess.STDOUT)
    return _Process(job, process, slot, log, begin, time.monotonic())


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """Of a job: one GPU of those that this process sees, and its share of the processor's cores."""
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    if (count := torch.cuda.device_count()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        env["CUDA_VISIBLE_DEVICES"] = visible[slot % count]
    return env


def _error(process: _Process) -> str:
    """Why a process ended, "" if its job is finished."""
    if is_finished(process.job):
        return ""
    lines = process.log.read_bytes()[process.begin :].decode(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    code = process.process.returncode
    end = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return errors[-1] if errors else f"{end}; see {process.log}"


def _stop(running: Sequence[_Process]) -> None:
    """Interrupt the processes as Ctrl-C would, and kill those that do not end."""
    for process in running:
        process.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + PATIENCE_SECONDS
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.process.wait(max(0.1, deadline - time.monotonic()))
        finish(process.process)


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
