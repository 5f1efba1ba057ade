"""Several runs side by side, each with its measurements in a process of its own with a log file.

No process outlives the sweep, also not one that is killed (`attached.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lolcats.errors import LolcatsError
from lolcats.files import write_text
from lolcats.runs.folder import CHECKPOINTS
from lolcats.sweep.attached import finish, start_attached
from lolcats.sweep.job import SWEEP_FILE, Job, Sweep, SweepRun, is_finished
from lolcats.sweep.measure import Say

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
    started: float = field(default_factory=time.monotonic)


def run_jobs(
    sweep: Sweep, todo: Sequence[Job], jobs: int, *, share: bool, ended: Callable[[Job, str], None], say: Say
) -> None:
    """Do `todo`, `jobs` at a time; several GPUs are taken in turn. An interruption ends all processes.

    A job that runs out of memory beside others is tried again later, with one job fewer at a time.

    Args:
        todo: runs, and teachers to be measured.
        share: do a stage 1 that several runs have in common once; the others wait for it.
        ended: called with each job that ended and its error in one line ("" for none).
        say: where progress is shown.
    """
    sweep.logs.mkdir(exist_ok=True)
    write_text(sweep.logs / SWEEP_FILE, sweep.text)  # the file that was given may lack the overrides
    waiting, at_once = list(todo), jobs
    running: list[_Process] = []
    try:
        while waiting or running:
            for process in [process for process in running if process.process.poll() is not None]:
                job, beside = process.job, len(running) > 1
                running.remove(process)
                error = _end(process)
                seconds, left = time.monotonic() - process.started, len(waiting) + len(running)
                say(f"{job.name} ended after {seconds:,.0f} s; {left} left")
                if beside and at_once > 1 and any(words in error for words in NO_MEMORY):
                    at_once -= 1
                    waiting.append(job)
                    say(f"{job.name} ran out of memory and is tried again; {at_once} jobs at a time now")
                else:
                    ended(job, error)
            while len(running) < at_once and (job := _next(waiting, [p.job for p in running], share)):
                waiting.remove(job)
                slot = min(set(range(jobs)) - {process.slot for process in running})
                running.append(_start(job, sweep, slot, jobs, share, say))
            time.sleep(POLL_SECONDS)
    finally:
        _stop(running)


def take_stage_one(job: Job, runs: Sequence[SweepRun]) -> str:
    """Copy the finished stage 1 of another of `runs` into a run that has not begun its own.

    Stage 1 is done once for all runs whose settings differ only in what comes after it. Their results are those that
    they would have had alone, but for the clock.

    Returns:
        The name of the run that the checkpoints are from, "" if nothing was copied.
    """
    if not isinstance(job, SweepRun) or not job.stage_one or job.folder.results().complete:
        return ""
    if (job.folder.checkpoints("transfer") / "last.safetensors").exists():
        return ""
    for other in runs:
        if other.name != job.name and other.stage_one == job.stage_one and _stage_one_is_done(other):
            job.folder.prepare(job.config, resume=True)
            job.folder.copy_stage("transfer", other.folder)
            return other.name
    return ""


def _stage_one_is_done(run: SweepRun) -> bool:
    """Whether stage 1 of a run is finished, and its checkpoints are there."""
    try:
        done = run.steps_done("transfer")
    except LolcatsError:  # a broken file is the business of the run that made it
        return False
    return done == run.steps("transfer") and all((run.folder.checkpoints("transfer") / f).exists() for f in CHECKPOINTS)


def _next(waiting: Sequence[Job], running: Sequence[Job], share: bool) -> Job | None:
    """The first job that need not wait for the stage 1 of one that is running."""
    runs = [job for job in running if isinstance(job, SweepRun)] if share else []
    busy = {run.stage_one for run in runs if not _stage_one_is_done(run)} - {""}
    return next((job for job in waiting if job.stage_one not in busy), None)


def _start(job: Job, sweep: Sweep, slot: int, jobs: int, share: bool, say: Say) -> _Process:
    origin = take_stage_one(job, sweep.runs) if share else ""
    log = sweep.logs / f"{job.name}.log"
    command = [sys.executable, "-m", "lolcats.cli", "sweep-job", str(sweep.logs / SWEEP_FILE), job.name, "--attached"]
    note = f", stage 1 is that of {origin}" if origin else ""
    say(f"{job.name} runs (log: {log}{note})")
    with log.open("ab") as file:
        begin = file.tell()
        process = start_attached(command, env=_environment(slot, jobs), stdout=file, stderr=subprocess.STDOUT)
    return _Process(job, process, slot, log, begin)


def _environment(slot: int, jobs: int) -> dict[str, str]:
    """Of a job: one GPU of those that this process sees, and its share of the processor's cores."""
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    if (count := torch.cuda.device_count()) > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        env["CUDA_VISIBLE_DEVICES"] = visible[slot % count]
    return env


def _end(process: _Process) -> str:
    """Forget a process that has ended; returns why it did, "" if its job is finished."""
    finish(process.process)
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
