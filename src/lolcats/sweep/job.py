"""A sweep and its jobs: a run with its measurements, or a teacher's measurements. What is done of them, files say."""

from __future__ import annotations

import difflib
import gc
import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.files import hold
from lolcats.runs.folder import RunFolder
from lolcats.runs.recipe import linearize
from lolcats.sweep.measure import MeasureConfig, Measured, Say, measure_model

Stage = Literal["transfer", "finetune"]
STAGES: tuple[Stage, Stage] = ("transfer", "finetune")
Status = Literal["new", "started", "trained", "finished"]
"""A run that is trained has its model; some of what the section `measure` asks for is missing."""
TRAINED = ("trained", "finished")
"""States of a run without a step left."""
RUN, SEED = "run", "seed"
"""Name of the axis that the section `runs` makes, and of the one over which means are taken."""
SWEEP_FILE = "sweep.yaml"
AFTER_STAGE_ONE = {"name", "runs_dir", "finetune", "evaluation"}
"""Settings that stage 1 does not read."""
LONGEST = 40
"""Characters of a value in a name."""
Studies = dict[str, dict[str, str]]
"""Study -> name of a run in it -> name of the run of the joint sweep."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    """Also of its folder inside the sweep's."""
    config: RunConfig
    settings: dict[str, Any]
    """Axis or swept key -> the value that this run has there; the axis `run` holds the name of its set of settings."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    """What is measured of the finished student; the same for all runs of a sweep."""

    @property
    def folder(self) -> RunFolder:
        """Where it is done."""
        return RunFolder.of(self.config)

    @property
    def measured(self) -> Measured:
        """What is known of its student."""
        return Measured(self.folder.path / "measurements" / "measure.json")

    @property
    def stage_one(self) -> str:
        """Text that is equal for runs with the same stage 1; "" for a run without one."""
        if not self.config.transfer.enabled:
            return ""
        return json.dumps(self.config.model_dump(mode="json", exclude=AFTER_STAGE_ONE), sort_keys=True)

    def status(self) -> Status:
        """How far it is."""
        if not self.folder.config_file.exists():
            return "new"
        if not self.folder.results().complete or not self.folder.has_model():
            return "started"
        return "trained" if self.measured.missing(self.measure) else "finished"

    def steps(self, stage: Stage) -> int:
        """All steps of a stage."""
        settings = getattr(self.config, stage)
        return settings.steps(self.config.data.sequence_length) if settings.enabled else 0

    def steps_done(self, stage: Stage) -> int:
        """Steps of a stage that need not be done again; all of them if the run is finished."""
        if self.folder.results().complete:
            return self.steps(stage)
        return self.folder.steps_done(stage)

    def do(self, console: Console | None) -> None:
        """Linearize, then measure the student."""
        if self.status() not in TRAINED:
            linearize(self.config, resume=True, console=console)
            _release_memory()
        where = {"teacher": self.config.model, "device": self.config.device}
        measure_model(str(self.folder.model), self.measured, self.measure, say=speaker(console), **where)


@dataclass(frozen=True)
class SweepTeacher:
    """A teacher that is measured once, for all runs that have it."""

    name: str
    config: RunConfig
    """Of one of its runs."""
    measure: MeasureConfig
    file: Path
    settings: dict[str, Any] = field(default_factory=dict)
    """Of a run; a teacher has none, and no stage 1."""
    stage_one = ""

    @property
    def measured(self) -> Measured:
        """What is known of it."""
        return Measured(self.file)

    def status(self) -> Status:
        """How much is measured."""
        if not self.measured.missing(self.measure):
            return "finished"
        return "started" if self.measured.scores(self.measure) else "new"

    def do(self, console: Console | None) -> None:
        """Measure it."""
        where = {"device": self.config.device, "dtype": self.config.dtype}
        measure_model(self.config.model, self.measured, self.measure, say=speaker(console), **where)


Job = SweepRun | SweepTeacher


@dataclass(frozen=True)
class Sweep:
    """A sweep as its file says."""

    name: str
    folder: Path
    axes: dict[str, list[Any]]
    """Axis -> its values, in the order of the file."""
    keys: list[str]
    """Keys of the configuration in which runs differ, in the order of the file; `run` is not among them."""
    runs: list[SweepRun]
    text: str
    """The sweep as YAML that needs no other file and no overrides."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    studies: Studies = field(default_factory=dict)
    """Of a sweep that joins others."""

    @property
    def logs(self) -> Path:
        """Folder of what belongs to processes: their output and locks, and the sweep as they read it."""
        return self.folder / "logs"

    def lock(self, name: str) -> Path:
        """The file that is held while a job is done."""
        return self.logs / f".{name}.lock"

    def jobs(self, runs: Sequence[SweepRun] | None = None) -> list[Job]:
        """The teachers to be measured, and the runs: all, or only some with their teachers."""
        chosen = self.runs if runs is None else runs
        return [*sweep_teachers(self, chosen), *chosen]


def sweep_teachers(sweep: Sweep, runs: Sequence[SweepRun]) -> list[SweepTeacher]:
    """The teachers of `runs`, one for each model and number format; "teacher" where the whole sweep has one alone."""
    if not (sweep.measure.teacher and sweep.measure.anything):
        return []
    configs = {(run.config.model, run.config.dtype): run.config for run in reversed(sweep.runs)}
    wanted = {(run.config.model, run.config.dtype) for run in runs}
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
    """The run or teacher of a name, or an error if there is none."""
    for job in sweep.jobs():
        if job.name == name:
            return job
    raise LolcatsError(f"{name}: neither a run nor a teacher of {sweep.name}; its runs are in {sweep.folder}")


def choose_runs(sweep: Sweep, patterns: Sequence[str]) -> list[SweepRun]:
    """The runs whose names match one of the patterns (`*`, `?`, `[...]` as in a shell), in the order of the sweep.

    A pattern that no name matches is an error, which gives the nearest name.
    """
    names = [run.name for run in sweep.runs]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, 1, 0.6)
            more = ", ..." if len(names) > 4 else ""
            hint = f"did you mean {near[0]}?" if near else f"its runs are {', '.join(names[:4])}{more}"
            raise LolcatsError(f"{pattern}: no run of {sweep.name} has this name; {hint}")
    return [run for run in sweep.runs if any(fnmatchcase(run.name, pattern) for pattern in patterns)]


def do_job(job: Job, console: Console | None) -> None:
    """Do what is left of a run (linearize, then measure its student) or of a teacher (measure it).

    Raises:
        LolcatsError: see `linearize` and `measure_model`.
    """
    try:
        job.do(console)
    finally:
        _release_memory()


def hold_job(sweep: Sweep, name: str) -> AbstractContextManager[None]:
    """Keep other processes from a run or teacher that this one does for a sweep; see `hold`."""
    return hold(sweep.lock(name), f"another process works on {name} of the sweep in {sweep.folder}")


def is_finished(job: Job) -> bool:
    """Whether nothing of a job is left to do. One whose files cannot be read is not: whoever does it says why."""
    try:
        return job.status() == "finished"
    except LolcatsError:
        return False


def speaker(console: Console | None) -> Say:
    """What shows lines as they are; of no console, nothing."""

    def say(text: str) -> None:
        if console is not None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    return say


def label(value: Any) -> str:
    """A value as part of a file's name."""
    if type(value) is int and value >= 10_000 and value % 100 == 0:
        millions = value >= 1_000_000 and value % 10_000 == 0
        return f"{value / 1e6:g}M" if millions else f"{value / 1e3:g}k" if value < 100_000_000 else str(value)
    text = ".".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "-"
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 9]}-{digest}"


def _release_memory() -> None:
    """Give back what a model that is not used any more has taken."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
