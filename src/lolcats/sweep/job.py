"""The parts of a sweep that can be done by themselves: a run with its measurements, and a teacher's measurements."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.runs.recipe import linearize
from lolcats.sweep.measure import MeasureConfig
from lolcats.sweep.measured import Measured
from lolcats.sweep.measuring import Say, measure_model, release_memory
from lolcats.sweep.naming import label
from lolcats.sweep.settings import Sweep, SweepRun
from lolcats.sweep.state import run_status


@dataclass(frozen=True)
class SweepTeacher:
    """A teacher that is measured once, for all runs that have it."""

    name: str
    config: RunConfig
    """Of one of its runs."""
    measure: MeasureConfig
    file: Path

    @property
    def is_finished(self) -> bool:
        """Whether nothing is missing."""
        return Measured(self.file).is_complete(self.measure)


Job = SweepRun | SweepTeacher


def sweep_teachers(sweep: Sweep, runs: Sequence[SweepRun] | None = None) -> list[SweepTeacher]:
    """The teachers to be measured, one for each model and number format; "teacher" where there is one alone.

    Args:
        runs: only those of these runs.
    """
    if not (sweep.measure.teacher and sweep.measure.anything):
        return []
    configs = {(run.config.model, run.config.dtype): run.config for run in reversed(sweep.runs)}
    wanted = {(run.config.model, run.config.dtype) for run in (sweep.runs if runs is None else runs)}
    teachers = []
    measure = sweep.measure.model_copy(update={"controls": []})
    for (model, dtype), config in reversed(configs.items()):
        digest = hashlib.sha256(f"{model} {dtype}".encode()).hexdigest()[:8]
        name = f"teacher-{label(Path(model).name)}-{dtype}-{digest}"
        file = sweep.folder / "measurements" / f"{name}.json"
        if (model, dtype) in wanted:
            teachers.append(SweepTeacher(name if len(configs) > 1 else "teacher", config, measure, file))
    return teachers


def find_job(sweep: Sweep, name: str) -> Job:
    """The run or teacher of a name.

    Raises:
        LolcatsError: there is none.
    """
    for job in [*sweep.runs, *sweep_teachers(sweep)]:
        if job.name == name:
            return job
    raise LolcatsError(f"{name}: neither a run nor a teacher of {sweep.name}; its runs are in {sweep.folder}")


def do_job(job: Job, console: Console | None) -> None:
    """Do what is left of a run (linearize, then measure its student) or of a teacher (measure it).

    Raises:
        LolcatsError: see `linearize` and `measure_model`.
    """

    def say(text: str) -> None:
        if console is not None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    try:
        if isinstance(job, SweepTeacher):
            config = job.config
            measured = Measured(job.file)
            measure_model(config.model, measured, job.measure, device=config.device, dtype=config.dtype, say=say)
        else:
            _do_run(job, console, say)
    finally:
        release_memory()


def _do_run(run: SweepRun, console: Console | None, say: Say) -> None:
    folder = linearize(run.config, resume=True, console=console)
    release_memory()
    where = {"teacher": run.config.model, "device": run.config.device}
    measure_model(str(folder.model), Measured.of_run(folder), run.measure, **where, say=say)


def is_finished(job: Job) -> bool:
    """Whether nothing of a job is left to do. One whose files cannot be read is not: whoever does it says why."""
    try:
        return job.is_finished if isinstance(job, SweepTeacher) else run_status(job) == "finished"
    except LolcatsError:
        return False
