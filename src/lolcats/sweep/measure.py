"""The section `measure` of a sweep file: the benchmarks and recall tasks that every finished student is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from lolcats.config import Control, dotted, explain
from lolcats.config.fields import Count, Positive, Section
from lolcats.errors import LolcatsError
from lolcats.evaluation.harness import HarnessSettings
from lolcats.evaluation.recall import RecallSettings, check_tasks


class MeasureConfig(Section):
    """What is measured of a model beside perplexity; without tasks and recall, nothing."""

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

    def recall_settings(self) -> RecallSettings:
        """What recall asks."""
        return RecallSettings(self.recall, self.lengths, self.samples)

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
    measure: MeasureConfig = Field(default_factory=MeasureConfig)


def read_measure(section: object, problems: list[str]) -> MeasureConfig:
    """The section of a sweep file, nothing to measure where there is none; what is wrong goes to `problems`."""
    if section is None:
        return MeasureConfig()
    if not isinstance(section, dict):
        problems.append(f"measure: expected `key: value` lines, such as tasks: [piqa] (got {section!r:.60})")
        return MeasureConfig()
    try:
        return _File.model_validate({"measure": section}).measure
    except ValidationError as error:
        problems += explain(error, _keys())
        return MeasureConfig()


def _keys() -> Sequence[str]:
    return dotted(_File().model_dump())
