"""Run a sweep: one run after the other in this process. `jobs.py` runs several side by side."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from lolcats.config import flat, load_config
from lolcats.errors import LolcatsError
from lolcats.evaluation.harness.run import load_benchmarks, require_lm_eval
from lolcats.files import hold, remove_leftovers, write_text
from lolcats.models.context import check_context
from lolcats.models.empty import known_model
from lolcats.silence import quiet
from lolcats.sweep.job import SWEEP_FILE, Job, Sweep, SweepRun, choose_runs, do_job, is_finished, speaker
from lolcats.sweep.jobs import run_jobs, take_stage_one
from lolcats.sweep.measure import Say
from lolcats.sweep.results import MEASUREMENTS, SweepMeasurement, Table, gather, read_failures, write_table

PATIENCE_SECONDS = 60.0
"""How long a call waits for processes of an earlier one."""


def run_sweep(
    sweep: Sweep,
    source: str | Path,
    *,
    only: Sequence[str] = (),
    overwrite: Sequence[str] = (),
    jobs: int = 1,
    share: bool = True,
    measurements: Sequence[SweepMeasurement] = MEASUREMENTS,
    describe: Callable[[Exception], str] = str,
    console: Console | None = None,
) -> Table:
    """Do all runs that are not finished, each in a folder of its own, and gather the results after every one.

    A run that was interrupted goes on from its last checkpoint. One that fails is noted, and the sweep goes on. What
    the section `measure` asks for is measured of each student as soon as it is there, and of the teacher first.

    Args:
        source: the sweep file.
        only: patterns of names; other runs are left as they are.
        overwrite: patterns of names; these runs are deleted first.
        jobs: runs at a time, each a process of its own where it is more than one.
        share: do a stage 1 that several runs have in common once.
        measurements: what to know of each finished run.
        describe: turns the exception that ended a run into a line.
        console: where progress is shown; None is silent.

    Returns:
        The table, which is also in the sweep's folder; rows of failed runs have an error.

    Raises:
        LolcatsError: a run on disk has other settings, a pattern matches no run, what shall be measured cannot be,
            another sweep works in the folder, a process of a killed one has not ended, or it cannot be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LolcatsError(
            "a sweep is one process; to use several GPUs let it do several jobs, without torchrun", hint="jobs"
        )
    chosen = choose_runs(sweep, only) if only else sweep.runs
    replaced = choose_runs(sweep, overwrite) if overwrite else []
    progress = _Progress(sweep, measurements, describe, console)
    with hold_folder(sweep):
        wait_for_jobs(sweep, progress.say)
        check_runs(sweep, replaced)
        if replaced or not all(map(is_finished, sweep.jobs(chosen))):
            check_measure(sweep)
        _open_folder(sweep, Path(source), replaced)
        progress.failures = read_failures(sweep)
        return progress.do(chosen, jobs, share)


@dataclass
class _Progress:
    """A sweep at work."""

    sweep: Sweep
    measurements: Sequence[SweepMeasurement]
    describe: Callable[[Exception], str]
    console: Console | None
    failures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.say = speaker(self.console)

    def do(self, chosen: Sequence[SweepRun], jobs: int, share: bool) -> Table:
        """Do what is left of some runs."""
        todo = [job for job in self.sweep.jobs(chosen) if not is_finished(job)]
        if finished := len(chosen) - sum(isinstance(job, SweepRun) for job in todo):
            self.say(f"{finished} of {len(chosen)} runs are finished already")
        self.write()
        if jobs > 1 and todo:
            run_jobs(self.sweep, todo, jobs, share=share, ended=self.ended, say=self.say)
        else:
            for number, job in enumerate(todo, start=1):
                self.say(f"\n[{number}/{len(todo)}] {job.name}")
                self.ended(job, self._do_here(job, share))
        return self.write()

    def _do_here(self, job: Job, share: bool) -> str:
        """Do one job in this process; returns its error in one line, or ""."""
        try:
            if share and (origin := take_stage_one(job, self.sweep.runs)):
                self.say(f"stage 1 is that of {origin}")
            do_job(job, self.console)
        except Exception as problem:  # whatever ended this run, the others do not depend on it
            return " ".join(self.describe(problem).split())
        return ""

    def ended(self, job: Job, error: str) -> None:
        """Note how a job ended ("" is well)."""
        self.failures.pop(job.name, None)
        if error:
            self.failures[job.name] = error
            self.say(f"{job.name} failed: {error}")
        self.write()

    def write(self) -> Table:
        """Bring the table up to date."""
        table = gather(self.sweep, self.failures, self.measurements)
        write_table(self.sweep, table)
        return table


def hold_folder(sweep: Sweep) -> AbstractContextManager[None]:
    """Keep other sweeps out of the folder: two of them would do the same runs into the same files. See `hold`."""
    busy = f"another `lolcats sweep` works in {sweep.folder}; wait for it, end it, or choose another name=..."
    folder = sweep.folder.resolve()  # one lock, by whatever links it is reached
    return hold(folder.parent / f".{folder.name}.lock", busy)


def wait_for_jobs(sweep: Sweep, say: Say, patience: float = PATIENCE_SECONDS) -> None:
    """Wait for the processes of an earlier call, which was killed: they are about to end by themselves.

    One that has not ended after `patience` seconds is an error.
    """
    deadline = time.monotonic() + patience
    for lock in sorted(sweep.logs.glob(sweep.lock("*").name)):
        name = lock.name.removeprefix(".").removesuffix(".lock")
        busy = f"a process of an earlier call still works on {name} in {sweep.folder}; wait for it, or end it"
        try:
            with hold(lock, busy):
                continue
        except LolcatsError:
            say(f"waiting for a process of an earlier call, which works on {name}")
        with hold(lock, busy, max(0.0, deadline - time.monotonic())):
            pass


def check_runs(sweep: Sweep, replaced: Sequence[SweepRun] = ()) -> None:
    """Refuse to go on where a run on disk was made with other settings than the sweep gives it now.

    Args:
        replaced: runs that will be deleted, and may differ.

    Raises:
        LolcatsError: which runs differ, in what, and what to do.
    """
    folder = sweep.folder
    remove_leftovers(folder / SWEEP_FILE)  # of a process that was killed before it had written what makes it a sweep
    if folder.exists() and any(folder.iterdir()) and not (folder / SWEEP_FILE).exists():
        raise LolcatsError(f"{folder} is not empty and is not a sweep of lolcats; choose another name=...")
    kept = [run for run in sweep.runs if run not in replaced and run.folder.config_file.exists()]
    problems = [f"{run.name} ({', '.join(changes)})" for run in kept if (changes := _changes(run))]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise LolcatsError(
            f"{len(problems)} of the runs in {folder} were made with other settings: {'; '.join(problems[:3])}{more}. "
            "Overwrite them, or choose another name=...",
            hint="overwrite_runs",
        )


def check_measure(sweep: Sweep, *, fetch: bool = True) -> None:
    """See that everything can be measured before anything is trained.

    Args:
        fetch: also get what is on the hub; else tasks are looked up by name, where lm-eval is installed.

    Raises:
        LolcatsError: lm-eval is missing, a task or its data cannot be had, or a length is beyond a model's context.
    """
    measure = sweep.measure
    if measure.tasks and (fetch or importlib.util.find_spec("lm_eval")):
        require_lm_eval()
        from lolcats.evaluation.harness.catalog import catalog

        with quiet():
            if fetch or measure.task_data is not None:
                load_benchmarks(measure.tasks, measure.harness_settings())
            else:
                catalog().check(measure.tasks)
    for source in dict.fromkeys(run.config.model for run in sweep.runs) if measure.recall else ():
        if (model := known_model(source)) is not None:
            check_context(model, max(measure.lengths), "measure.lengths: a prompt", beyond=False)


def _changes(run: SweepRun) -> list[str]:
    """The first settings in which the file of a run differs from the sweep's, as "key: in the file -> now"."""
    try:
        before = flat(load_config(run.folder.config_file).model_dump(mode="json"))
    except LolcatsError as error:
        return [str(error)]
    now = flat(run.config.model_dump(mode="json"))
    changed = [key for key in dict.fromkeys([*now, *before]) if now.get(key) != before.get(key)]
    return [f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed[:3]]


def _open_folder(sweep: Sweep, source: Path, replaced: Sequence[SweepRun]) -> None:
    """Make the sweep's folder, delete the runs to be replaced, and write down the sweep, but not over `source`."""
    for run in replaced:
        if run.folder.config_file.exists():
            with run.folder.held():
                run.folder.clear()
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LolcatsError(f"cannot make the folder {sweep.folder}: {error.strerror}") from error
    file = sweep.folder / SWEEP_FILE
    if not (file.exists() and source.exists() and file.samefile(source)):
        write_text(file, sweep.text)
