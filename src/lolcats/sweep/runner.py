"""Run a sweep: one run after the other in this process. `jobs.py` runs several side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from lolcats.errors import LolcatsError
from lolcats.sweep.job import Job, SweepTeacher, check_measure, do_job, is_finished, sweep_teachers
from lolcats.sweep.jobs import run_jobs
from lolcats.sweep.measured import MEASUREMENTS, SweepMeasurement
from lolcats.sweep.results import Table, gather, read_failures, write_table
from lolcats.sweep.settings import Sweep, SweepRun
from lolcats.sweep.sharing import take_stage_one
from lolcats.sweep.state import check_runs, choose_runs, hold_folder, open_folder, wait_for_jobs


@dataclass
class _Progress:
    sweep: Sweep
    measurements: Sequence[SweepMeasurement]
    console: Console | None
    failures: dict[str, str] = field(default_factory=dict)

    def say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def ended(self, run: Job, error: str) -> None:
        """Note how a run, or the measuring of a teacher, ended ("" is well), and bring the table up to date."""
        self.failures.pop(run.name, None)
        if error:
            self.failures[run.name] = error
            self.say(f"{run.name} failed: {error}")
        self.write()

    def write(self) -> Table:
        table = gather(self.sweep, self.failures, self.measurements)
        write_table(self.sweep, table)
        return table


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
    progress = _Progress(sweep, measurements, console)
    with hold_folder(sweep):
        wait_for_jobs(sweep, progress.say)
        _open(sweep, Path(source), chosen, replaced)
        return _run_all(sweep, chosen, jobs, share, describe, progress)


def _run_all(
    sweep: Sweep, chosen: Sequence[SweepRun], jobs: int, share: bool, describe: Callable[[Exception], str],
    progress: _Progress,
) -> Table:  # fmt: skip
    progress.failures = read_failures(sweep)
    todo: list[Job] = [job for job in [*sweep_teachers(sweep, chosen), *chosen] if not is_finished(job)]
    if finished := len(chosen) - len([job for job in todo if isinstance(job, SweepRun)]):
        progress.say(f"{finished} of {len(chosen)} runs are finished already")
    progress.write()
    if jobs > 1 and todo:
        run_jobs(sweep, todo, jobs, share=share, ended=progress.ended, say=progress.say)
    else:
        for number, job in enumerate(todo, start=1):
            progress.say(f"\n[{number}/{len(todo)}] {job.name}")
            progress.ended(job, _do_here(job, sweep.runs if share else [], describe, progress))
    return progress.write()


def _open(sweep: Sweep, source: Path, chosen: Sequence[SweepRun], replaced: Sequence[SweepRun]) -> None:
    """The folder, once it is known that what is left can be measured."""
    check_runs(sweep, replaced)
    if replaced or not all(map(is_finished, [*sweep_teachers(sweep, chosen), *chosen])):
        check_measure(sweep)
    open_folder(sweep, source, replaced)


def _do_here(job: Job, others: Sequence[SweepRun], describe: Callable[[Exception], str], progress: _Progress) -> str:
    """Do one job in this process; returns its error in one line, or ""."""
    try:
        if not isinstance(job, SweepTeacher) and (origin := take_stage_one(job, others)):
            progress.say(f"stage 1 is that of {origin}")
        do_job(job, progress.console)
    except Exception as problem:  # whatever ended this run, the others do not depend on it
        return " ".join(describe(problem).split())
    return ""
