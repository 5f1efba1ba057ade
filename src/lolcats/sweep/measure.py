"""What a sweep measures of a model beside perplexity: its section `measure`, and the file that keeps the numbers.

Each number is kept with the settings that it depends on, so only what is new or was measured otherwise is missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lolcats.config import Control, dotted, explain
from lolcats.config.fields import Count, Positive, Section
from lolcats.errors import LolcatsError
from lolcats.evaluation.compare import Loaded, load_variants
from lolcats.evaluation.harness import HarnessSettings, Row, Scores, Show
from lolcats.evaluation.harness.run import load_benchmarks, measure_benchmarks, require_lm_eval
from lolcats.evaluation.recall import Cell, RecallSettings, check_tasks, recall
from lolcats.evaluation.store import AnswerStore
from lolcats.files import read_json_object, write_text
from lolcats.silence import quiet
from lolcats.variants import VARIANTS

AGAIN = "delete it: it is measured anew"
Say = Callable[[str], None]


class MeasureConfig(Section):
    """The section `measure` of a sweep file; without tasks and recall, nothing is measured."""

    tasks: list[str] = Field(default=[])  # tasks and groups of lm-eval
    task_data: str | None = None  # folder of local files; None fetches data from the hub
    limit: Positive | None = None  # questions of each task, or part of a group; None takes all
    num_fewshot: dict[str, Count] = Field(default={})  # task or group -> examples in the prompt
    batch_size: Positive = 32  # requests, or prompts of recall, at once
    recall: list[str] = Field(default=[])  # names of recall tasks
    lengths: list[Positive] = Field(default=[512, 1024, 2048], min_length=1)  # tokens of prompt and answer
    samples: Positive = 20  # prompts a recall task and length
    teacher: bool = True  # measure the teacher too, once for all runs
    controls: list[Control] = Field(default=[])  # modes of each student that are measured on the tasks too

    @field_validator("tasks", "recall", mode="before")
    @classmethod
    def _read_one_name(cls, value: object) -> object:
        names = value.split(",") if isinstance(value, str) else value
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return list(dict.fromkeys(name.strip() for name in names))
        return names

    @field_validator("recall")
    @classmethod
    def _check_recall(cls, names: list[str]) -> list[str]:
        try:
            return check_tasks(names)
        except LolcatsError as error:
            raise ValueError(str(error)) from error

    @property
    def anything(self) -> bool:
        """Whether there is something to measure."""
        return bool(self.tasks or self.recall)

    @property
    def cells(self) -> list[tuple[str, int]]:
        """Task and length of all that recall asks."""
        return [(task, length) for task in self.recall for length in sorted(set(self.lengths))]

    def harness_settings(self) -> HarnessSettings:
        """How lm-eval's tasks are run."""
        folder = None if self.task_data is None else Path(self.task_data).expanduser()
        return HarnessSettings(folder, self.num_fewshot, limit=self.limit, batch_size=self.batch_size)

    def task_identity(self, task: str) -> dict[str, Any]:
        """What the numbers of a task depend on: with other settings it is measured again."""
        # The number of examples of another task in the list is no matter of this one.
        examples = {key: n for key, n in self.num_fewshot.items() if key == task or key not in self.tasks}
        controls = {"controls": sorted(self.controls)} if self.controls else {}
        return {"task_data": self.task_data, "limit": self.limit, "num_fewshot": examples, **controls}

    def recall_identity(self) -> dict[str, Any]:
        """The same of recall; task and length stand beside it."""
        return {"samples": self.samples}


class _File(Section):
    measure: MeasureConfig = MeasureConfig()


def read_measure(section: object, problems: list[str]) -> MeasureConfig:
    """The section of a sweep file, nothing to measure where there is none; what is wrong goes to `problems`."""
    if not isinstance(section, dict | None):
        problems.append(f"measure: expected `key: value` lines, such as tasks: [piqa] (got {section!r:.60})")
        section = None
    try:
        return _File.model_validate({"measure": section or {}}).measure
    except ValidationError as error:
        problems += explain(error, dotted(_File().model_dump()))
        return MeasureConfig()


class Score(NamedTuple):
    """A number of the table."""

    value: float | None
    """None where it is not finite."""
    is_share: bool = True
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

    def missing_tasks(self, measure: MeasureConfig) -> list[str]:
        """The tasks that are not measured with these settings."""
        known = self._content.tasks
        return [t for t in measure.tasks if t not in known or known[t].settings != measure.task_identity(t)]

    def missing_cells(self, measure: MeasureConfig) -> list[tuple[str, int]]:
        """The same of recall: task and length."""
        known, settings = self._content.recall, measure.recall_identity()
        return [c for c in measure.cells if _cell(*c) not in known or known[_cell(*c)].settings != settings]

    def is_complete(self, measure: MeasureConfig) -> bool:
        """Whether nothing is missing."""
        return not self.missing_tasks(measure) and not self.missing_cells(measure)

    def add(self, measure: MeasureConfig, task: str, found: Scores | Cell) -> None:
        """Keep what a task of lm-eval gave, which may have several rows, or a cell of recall."""
        size = {"batch_size": measure.batch_size}
        if isinstance(found, Cell):
            record = _Recall(settings=measure.recall_identity(), cell=found, **size)
            self._content.recall[_cell(task, found.length)] = record
        else:
            facts = {"device": found.device, "dtype": found.dtype, **size}
            self._content.tasks[task] = _Task(settings=measure.task_identity(task), rows=found.rows, **facts)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps(self._content.model_dump(), indent=1) + "\n")

    def scores(self, measure: MeasureConfig) -> dict[str, Score]:
        """What is known with these settings: main metrics of the tasks, their averages, and recall by length."""
        missing, found = self.missing_tasks(measure), {}
        rows = [row for t in measure.tasks if t not in missing for row in self._content.tasks[t].rows]
        for row in rows:
            for variant, score in row.scores.items():
                name = f"{row.task}.{row.metric.removesuffix(',none')}{_ending(variant)}"
                found[name] = Score(finite(score.mean), row.is_share)
        # The mean over other tasks would not compare.
        for name, means in ({} if missing else Scores(rows, {}).averages()).items():
            found |= {
                f"tasks.{name.replace(' ', '_')}{_ending(variant)}": Score(mean) for variant, mean in means.items()
            }
        lacking = self.missing_cells(measure)
        known = [_cell(*cell) for cell in measure.cells if cell not in lacking]
        return found | {name: Score(self._content.recall[name].cell.score) for name in known}


def _cell(task: str, length: int) -> str:
    return f"{task}.{length}"


def _ending(variant: str) -> str:
    """Of the columns of a variant: those of controls bear its name."""
    return "" if variant in ("student", "teacher") else f".{variant}"


def finite(value: float | None) -> float | None:
    """JSON has no infinity: None stands for it."""
    return value if value is not None and math.isfinite(value) else None


def measure_model(source: str, measured: Measured, measure: MeasureConfig, *, say: Say, **how: Any) -> None:
    """Measure what is missing of a student or a teacher, and keep it; an interruption loses one batch at most.

    Args:
        source: the linearized model, or a pretrained one.
        measured: where the numbers go; answers to an unfinished task are kept beside it.
        say: where progress is shown.
        how: teacher, device and dtype, see `load_variants`.

    Raises:
        LolcatsError: a task or its data cannot be had, or does not fit the model.
    """
    if measured.is_complete(measure):
        return
    if not any(row.weights == "teacher" for row in VARIANTS if row.name in measure.controls):
        how.pop("teacher", None)
    said: set[str] = set()

    def show(label: str, done: int, count: int | None) -> None:
        if label not in said:
            said.add(label)
            say(f"measuring: {label}")

    with AnswerStore(measured.file.with_name(f"{measured.file.name}.progress")) as store:
        loaded = load_variants(source, controls=measure.controls, **how)
        name = "student" if "student" in loaded.variants else "teacher"
        if measured.missing_tasks(measure):
            _measure_tasks(loaded, name, measured, measure, store, show)
        missing = measured.missing_cells(measure)
        for task in dict.fromkeys(task for task, _ in missing):
            asked = RecallSettings([task], [n for other, n in missing if other == task], measure.samples)
            options = {"batch_size": measure.batch_size, "store": store, "report": show}
            for cell in recall({name: loaded.variants[name]}, loaded.tokenizer, asked, **options):
                measured.add(measure, task, cell)
    for column, score in measured.scores(measure).items():
        say(f"{name:<14} {column} " + ("-" if score.value is None else f"{score.value:.4f}"))


def _measure_tasks(
    loaded: Loaded, name: str, measured: Measured, measure: MeasureConfig, store: AnswerStore, show: Show
) -> None:
    require_lm_eval()
    modes = {key: mode for key, mode in loaded.variants.items() if key == name or key != "teacher"}
    settings, missing = measure.harness_settings(), measured.missing_tasks(measure)
    with quiet():
        for benchmark in load_benchmarks(measure.tasks, settings):  # all of them, because num_fewshot may name any
            if benchmark.name in missing:
                scores = measure_benchmarks(modes, loaded.tokenizer, [benchmark], settings, store, show)
                measured.add(measure, benchmark.name, scores)
