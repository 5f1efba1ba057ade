"""What a sweep measures of a model beside perplexity: its section `measure`, and the file that keeps the numbers.

Each number is kept with the settings that it depends on, so only what is new or was measured otherwise is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError, field_validator

from lolcats.config import Control, dotted, explain
from lolcats.config.fields import Count, Positive, Section
from lolcats.errors import LolcatsError
from lolcats.evaluation.compare import Loaded, load_variants
from lolcats.evaluation.harness import HarnessSettings, Row, Scores, Show
from lolcats.evaluation.harness.run import load_benchmarks, measure_benchmarks, require_lm_eval
from lolcats.evaluation.recall import Cell, RecallSettings, check_tasks, recall
from lolcats.evaluation.store import AnswerStore
from lolcats.evaluation.trained_window import has_window, why_left_out
from lolcats.files import read_json_object, write_text
from lolcats.runs.results import finite
from lolcats.silence import quiet
from lolcats.variants import TRAINED_WINDOW, VARIANTS

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

    def harness_settings(self) -> HarnessSettings:
        """How lm-eval's tasks are run."""
        folder = None if self.task_data is None else Path(self.task_data).expanduser()
        return HarnessSettings(folder, self.num_fewshot, limit=self.limit, batch_size=self.batch_size)

    def cells(self) -> dict[str, tuple[str, int]]:
        """Name of its column -> task and length, of all that recall asks."""
        return {f"{task}.{length}": (task, length) for task in self.recall for length in sorted(set(self.lengths))}

    def wanted(self) -> dict[str, dict[str, Any]]:
        """Task, or cell of recall -> what its numbers depend on: with other settings it is measured again."""
        how: dict[str, Any] = {"task_data": self.task_data, "limit": self.limit}
        how |= {"controls": sorted(self.controls)} if self.controls else {}
        # The number of examples of another task in the list is no matter of a task.
        few = {
            t: {key: n for key, n in self.num_fewshot.items() if key == t or key not in self.tasks} for t in self.tasks
        }
        tasks = {task: how | {"num_fewshot": few[task]} for task in self.tasks}
        return tasks | {cell: {"samples": self.samples} for cell in self.cells()}


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


class _Task(BaseModel, extra="allow"):
    settings: dict[str, Any]
    """What the numbers depend on."""
    rows: list[Row]


class _Recall(BaseModel, extra="allow"):
    settings: dict[str, Any]
    cell: Cell


class _Content(BaseModel):
    tasks: dict[str, _Task] = {}
    recall: dict[str, _Recall] = {}


class Measured:
    """The numbers of one model, read from measurements/measure.json of its run, or from the file of a teacher."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._content = _Content.model_validate(read_json_object(file, AGAIN))
        except ValidationError as error:
            raise LolcatsError(f"{file} is not what a sweep has measured; {AGAIN}") from error

    def missing(self, measure: MeasureConfig) -> list[str]:
        """The tasks, and cells of recall, that are not measured with these settings."""
        known = {name: record.settings for name, record in (self._content.tasks | self._content.recall).items()}
        return [name for name, settings in measure.wanted().items() if known.get(name) != settings]

    def add(self, name: str, measure: MeasureConfig, found: Scores | Cell) -> None:
        """Keep what a task of lm-eval gave, which may have several rows, or a cell of recall."""
        facts: dict[str, Any] = {"settings": measure.wanted()[name], "batch_size": measure.batch_size}
        if isinstance(found, Cell):
            self._content.recall[name] = _Recall(**facts, cell=found)
        else:
            facts |= {"device": found.device, "dtype": found.dtype}
            self._content.tasks[name] = _Task(**facts, rows=found.rows)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps(self._content.model_dump(), indent=1) + "\n")

    def scores(self, measure: MeasureConfig) -> dict[str, Score]:
        """What is known with these settings: main metrics of the tasks, their averages, and recall by length."""
        missing, found = self.missing(measure), {}
        rows = [row for task in measure.tasks if task not in missing for row in self._content.tasks[task].rows]
        for row in rows:
            for variant, score in row.scores.items():
                name = f"{row.task}.{row.metric.removesuffix(',none')}{_ending(variant)}"
                found[name] = Score(finite(score.mean), row.is_share)
        if not set(missing) & set(measure.tasks):  # the mean over other tasks would not compare
            for name, means in Scores(rows, {}).averages().items():
                for variant, mean in means.items():
                    found[f"tasks.{name.replace(' ', '_')}{_ending(variant)}"] = Score(mean)
        cells = [cell for cell in measure.cells() if cell not in missing]
        return found | {cell: Score(self._content.recall[cell].cell.score) for cell in cells}


def _ending(variant: str) -> str:
    """Of the columns of a variant: those of controls bear its name."""
    return "" if variant in ("student", "teacher") else f".{variant}"


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
    if not (missing := measured.missing(measure)):
        return
    if not any(row.weights in ("teacher", "window") for row in VARIANTS if row.name in measure.controls):
        how.pop("teacher", None)
    if TRAINED_WINDOW in measure.controls and not has_window(source):
        say(why_left_out(source))
    said: set[str] = set()

    def show(label: str, done: int, count: int | None) -> None:
        if label not in said:
            said.add(label)
            say(f"measuring: {label}")

    with AnswerStore(measured.file.with_name(f"{measured.file.name}.progress")) as store:
        loaded = load_variants(source, controls=measure.controls, **how)
        name = "student" if "student" in loaded.variants else "teacher"
        if tasks := [task for task in measure.tasks if task in missing]:
            _measure_tasks(loaded, tasks, measured, measure, store, show)
        for task in measure.recall:
            lengths = [length for cell, (other, length) in measure.cells().items() if other == task and cell in missing]
            asked = RecallSettings([task], lengths, measure.samples)
            options = {"batch_size": measure.batch_size, "store": store, "report": show}
            for cell in recall({name: loaded.variants[name]}, loaded.tokenizer, asked, **options) if lengths else ():
                measured.add(f"{task}.{cell.length}", measure, cell)
    for column, score in measured.scores(measure).items():
        say(f"{name:<14} {column} " + ("-" if score.value is None else f"{score.value:.4f}"))


def _measure_tasks(
    loaded: Loaded, tasks: Sequence[str], measured: Measured, measure: MeasureConfig, store: AnswerStore, show: Show
) -> None:
    require_lm_eval()
    modes = {key: mode for key, mode in loaded.variants.items() if key != "teacher"} or loaded.variants
    settings = measure.harness_settings()
    with quiet():
        for benchmark in load_benchmarks(measure.tasks, settings):  # all of them, because num_fewshot may name any
            if benchmark.name in tasks:
                scores = measure_benchmarks(modes, loaded.tokenizer, [benchmark], settings, store, show)
                measured.add(benchmark.name, measure, scores)
