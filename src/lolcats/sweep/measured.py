"""What was measured of one model on benchmarks and recall tasks, kept in a file, each number with its settings."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from lolcats.errors import LolcatsError
from lolcats.evaluation.harness import Row, Score, Scores
from lolcats.evaluation.recall import Cell
from lolcats.evaluation.recall import Progress as RecallProgress
from lolcats.files import write_text
from lolcats.runs.folder import RunFolder
from lolcats.sweep.measure import MeasureConfig
from lolcats.sweep.measurements import finite, read_object

AVERAGE = "tasks.average"
"""Column of the mean over the tasks."""


class ScoreColumn(NamedTuple):
    """A number of the table."""

    value: float | None
    is_share: bool
    """Whether it is a share of right answers, which people read in percent."""


class Measured:
    """The file of one model.

    Args:
        file: measurements/measure.json of a run, or the one of a teacher.

    Raises:
        LolcatsError: the file is something else.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        content = read_object(file, "it is measured anew")
        self._tasks: dict[str, Any] = content.get("tasks", {})
        self._recall: dict[str, Any] = content.get("recall", {})
        try:
            for record in self._tasks.values():
                _check_settings(record)
                _ = [_row(row).is_share for row in record["rows"]]
            for record in self._recall.values():
                _check_settings(record)
                _ = Cell(**record["cell"]).score + 0.0
        except (TypeError, LookupError, AttributeError) as error:
            raise LolcatsError(f"{file} is not what a sweep has measured; delete it: it is measured anew") from error

    @classmethod
    def of_run(cls, folder: RunFolder) -> Measured:
        """That of a run's student."""
        return cls(folder.path / "measurements" / "measure.json")

    def missing_tasks(self, measure: MeasureConfig) -> list[str]:
        """The tasks that are not measured with these settings."""
        return [task for task in measure.tasks if not _is_of(self._tasks.get(task), measure.task_identity(task))]

    def missing_cells(self, measure: MeasureConfig) -> list[str]:
        """The same of recall, as "passkey.512"."""
        cells = [_cell(task, length) for task in measure.recall for length in sorted(set(measure.lengths))]
        return [name for name in cells if not _is_of(self._recall.get(name), measure.recall_identity())]

    def is_complete(self, measure: MeasureConfig) -> bool:
        """Whether nothing is missing."""
        return not self.missing_tasks(measure) and not self.missing_cells(measure)

    def add_task(self, task: str, measure: MeasureConfig, scores: Scores, rows: list[Row]) -> None:
        """Keep a task, which may have several rows."""
        record = {"settings": measure.task_identity(task), "batch_size": measure.batch_size}
        record |= {"device": scores.device, "dtype": scores.dtype, "rows": [asdict(row) for row in rows]}
        self._tasks[task] = record
        self._write()

    def add_cell(self, measure: MeasureConfig, cell: Cell) -> None:
        """Keep a recall task at one length."""
        record = {"settings": measure.recall_identity(), "batch_size": measure.batch_size, "cell": asdict(cell)}
        self._recall[_cell(cell.task, cell.length)] = record
        self._write()

    def recall_progress(self, measure: MeasureConfig) -> RecallProgress:
        """What `recall` goes on from; its new cells are kept here."""
        progress = _KeptCells(self, measure)
        for record in self._recall.values():
            if _is_of(record, measure.recall_identity()):
                cell = Cell(**record["cell"])
                progress.cells[cell.variant, cell.task, cell.length] = cell
        return progress

    def columns(self, measure: MeasureConfig) -> dict[str, ScoreColumn]:
        """What is known with these settings: main metrics of the tasks, their averages, and recall by length."""
        missing = {*self.missing_tasks(measure), *self.missing_cells(measure)}
        rows = [_row(row) for t in measure.tasks if t not in missing for row in self._tasks[t]["rows"]]
        found = {}
        for row in rows:
            for variant, score in row.scores.items():
                name = f"{row.task}.{row.metric.removesuffix(',none')}{_ending(variant)}"
                found[name] = ScoreColumn(finite(score.mean), row.is_share)
        if not missing & set(measure.tasks):  # the mean over other tasks would not compare
            for name, means in Scores(rows, {}).averages().items():
                for variant, mean in means.items():
                    found[f"tasks.{name.replace(' ', '_')}{_ending(variant)}"] = ScoreColumn(mean, True)
        for task in measure.recall:
            for length in sorted(set(measure.lengths)):
                if (name := _cell(task, length)) not in missing:
                    found[name] = ScoreColumn(self._recall[name]["cell"]["score"], True)
        return found

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps({"tasks": self._tasks, "recall": self._recall}, indent=1) + "\n")


class _KeptCells(RecallProgress):
    """Cells that go to the file of a model as soon as they are known."""

    def __init__(self, measured: Measured, measure: MeasureConfig) -> None:
        super().__init__(None, {})
        self._measured, self._measure = measured, measure

    def add(self, cell: Cell) -> None:
        super().add(cell)
        self._measured.add_cell(self._measure, cell)


def _check_settings(record: dict[str, Any]) -> None:
    if not isinstance(record["settings"], dict):
        raise TypeError


def _is_of(record: dict[str, Any] | None, settings: dict[str, Any]) -> bool:
    return record is not None and record["settings"] == settings


def _cell(task: str, length: int) -> str:
    return f"{task}.{length}"


def _row(record: dict[str, Any]) -> Row:
    """A row as it was kept; raises TypeError, LookupError or AttributeError where it is none."""
    scores = {name: Score(**score) for name, score in record["scores"].items()}
    for score in scores.values():
        _ = score.mean + 0.0
    return Row(**{**record, "scores": scores})


def _ending(variant: str) -> str:
    """Of the columns of a variant: those of controls bear its name."""
    return "" if variant in ("student", "teacher") else f".{variant}"
