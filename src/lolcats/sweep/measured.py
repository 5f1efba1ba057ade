"""What is known of a finished run beside its weights, as columns of the table.

The numbers of benchmarks and recall tasks are kept in a file of the run, each with its settings (`Measured`). Other
measurements are functions with a name (`SweepMeasurement`): to add one, put it into `MEASUREMENTS`, or pass a list of
your own to `run_sweep`. One that has to run the model is made once and kept in RUN/measurements/NAME.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.evaluation.harness import Row, Scores
from lolcats.evaluation.recall import Cell
from lolcats.files import read_json_object, write_text
from lolcats.runs.folder import RunFolder
from lolcats.sweep.measure import MeasureConfig

AGAIN = "delete it: it is measured anew"
Columns = dict[str, float | None]
"""Name of a column, such as perplexity.student -> value; None where there is no finite number."""


class ScoreColumn(NamedTuple):
    """A number of the table."""

    value: float | None
    is_share: bool
    """Whether it is a share of right answers, which people read in percent."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow")

    settings: dict[str, Any]
    """What the numbers depend on."""
    batch_size: int | None = None


class _Task(_Record):
    rows: list[Row]


class _Recall(_Record):
    cell: Cell


class _Content(BaseModel):
    tasks: dict[str, _Task] = {}
    recall: dict[str, _Recall] = {}


class Measured:
    """The numbers of one model.

    Args:
        file: measurements/measure.json of a run, or the one of a teacher.

    Raises:
        LolcatsError: the file is something else.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._content = _Content.model_validate(read_json_object(file, AGAIN))
        except ValidationError as error:
            raise LolcatsError(f"{file} is not what a sweep has measured; {AGAIN}") from error

    @classmethod
    def of_run(cls, folder: RunFolder) -> Measured:
        """That of a run's student."""
        return cls(folder.path / "measurements" / "measure.json")

    def missing_tasks(self, measure: MeasureConfig) -> list[str]:
        """The tasks that are not measured with these settings."""
        known = self._content.tasks
        return [t for t in measure.tasks if t not in known or known[t].settings != measure.task_identity(t)]

    def missing_cells(self, measure: MeasureConfig) -> list[tuple[str, int]]:
        """The same of recall: task and length, short texts first."""
        known, settings = self._content.recall, measure.recall_identity()
        cells = [(task, length) for length in sorted(set(measure.lengths)) for task in measure.recall]
        return [c for c in cells if _cell(*c) not in known or known[_cell(*c)].settings != settings]

    def is_complete(self, measure: MeasureConfig) -> bool:
        """Whether nothing is missing."""
        return not self.missing_tasks(measure) and not self.missing_cells(measure)

    def add_task(self, task: str, measure: MeasureConfig, scores: Scores) -> None:
        """Keep a task, which may have several rows."""
        facts = {"device": scores.device, "dtype": scores.dtype, "batch_size": measure.batch_size}
        self._content.tasks[task] = _Task(settings=measure.task_identity(task), rows=scores.rows, **facts)
        self._write()

    def add_cell(self, measure: MeasureConfig, cell: Cell) -> None:
        """Keep a recall task at one length."""
        record = _Recall(settings=measure.recall_identity(), batch_size=measure.batch_size, cell=cell)
        self._content.recall[_cell(cell.task, cell.length)] = record
        self._write()

    def columns(self, measure: MeasureConfig) -> dict[str, ScoreColumn]:
        """What is known with these settings: main metrics of the tasks, their averages, and recall by length."""
        missing, found = self.missing_tasks(measure), {}
        rows = [row for t in measure.tasks if t not in missing for row in self._content.tasks[t].rows]
        for row in rows:
            for variant, score in row.scores.items():
                name = f"{row.task}.{row.metric.removesuffix(',none')}{_ending(variant)}"
                found[name] = ScoreColumn(finite(score.mean), row.is_share)
        if not missing:  # the mean over other tasks would not compare
            for name, means in Scores(rows, {}).averages().items():
                for variant, mean in means.items():
                    found[f"tasks.{name.replace(' ', '_')}{_ending(variant)}"] = ScoreColumn(mean, True)
        lacking = self.missing_cells(measure)
        for task in measure.recall:
            for length in sorted(set(measure.lengths)):
                if (task, length) not in lacking:
                    name = _cell(task, length)
                    found[name] = ScoreColumn(self._content.recall[name].cell.score, True)
        return found

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps(self._content.model_dump(), indent=1) + "\n")


def _cell(task: str, length: int) -> str:
    return f"{task}.{length}"


def _ending(variant: str) -> str:
    """Of the columns of a variant: those of controls bear its name."""
    return "" if variant in ("student", "teacher") else f".{variant}"


@dataclass(frozen=True)
class SweepMeasurement:
    """Something to know of every run.

    Args:
        name: also of the file in which the columns are kept.
        measure: makes the columns of a finished run.
        kept: whether they are written to a file, and read from it the next time.
    """

    name: str
    measure: Callable[[RunConfig, RunFolder], Columns]
    kept: bool = True


def run_results(config: RunConfig, folder: RunFolder) -> Columns:
    """The columns of results.json: perplexity, KL, tokens/s, seconds, and the memory of a text."""
    results = folder.results()
    columns: Columns = {}
    for section in ("perplexity", "kl", "tokens_per_second", "seconds"):
        columns |= {f"{section}.{name}": value for name, value in getattr(results, section).items()}
    if results.memory is not None:
        columns |= {"memory.bytes": results.memory.bytes, "memory.kv_tokens": results.memory.kv_tokens}
    columns.pop("kl.teacher", None)
    return columns


MEASUREMENTS: tuple[SweepMeasurement, ...] = (SweepMeasurement("results", run_results, kept=False),)


def measure_run(config: RunConfig, measurements: Sequence[SweepMeasurement] = MEASUREMENTS) -> Columns:
    """All columns of a finished run; what was kept is not measured again."""
    folder = RunFolder.of(config)
    columns: Columns = {}
    for measurement in measurements:
        file = folder.path / "measurements" / f"{measurement.name}.json"
        if measurement.kept and file.exists():
            kept = read_json_object(file, AGAIN)
            if not all(isinstance(value, float | int | None) for value in kept.values()):
                raise LolcatsError(f"{file} holds something that is not a number; {AGAIN}")
            columns |= kept
            continue
        new = {name: finite(value) for name, value in measurement.measure(config, folder).items()}
        if measurement.kept:
            file.parent.mkdir(exist_ok=True)
            write_text(file, json.dumps(new, indent=2) + "\n")
        columns |= new
    return columns


def finite(value: float | None) -> float | None:
    """JSON has no infinity: None stands for it."""
    return value if value is not None and math.isfinite(value) else None
