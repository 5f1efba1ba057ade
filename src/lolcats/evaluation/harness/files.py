"""Data of lm-eval's tasks from local files, handed over at the one place where a task would fetch its own.

A file is `<task>_<split>.jsonl`, or `.jsonl.gz`: one JSON object a line, with the fields of the data set on the hub.
A group or tag may have one file for all its tasks; the field that tells the tasks apart is found by its values. All
else, from prompts to metrics, is the task's own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask, Task

from lolcats.errors import DataError
from lolcats.evaluation.harness.catalog import Catalog, Source
from lolcats.files import read_json_lines
from lolcats.identity import digest

ENDINGS = (".jsonl", ".jsonl.gz")
Row = dict[str, Any]


class MissingFileError(DataError):
    """No file holds a split of a task."""


class TaskFile:
    """One file, read once.

    Raises:
        DataError: it cannot be read, a line is no JSON object, or it is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = _read_rows(path)

    @cached_property
    def digest(self) -> str:
        """A hash of what is in it."""
        return digest(self.rows)

    @cached_property
    def subjects(self) -> dict[str, list[Row]]:
        """A text in plain letters -> the rows that have it in a field; of several fields, the one with fewest texts."""
        fields: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in self.rows:
            for field, value in row.items():
                if isinstance(value, str):
                    fields[field][_plain(value)].append(row)
        found: dict[str, list[Row]] = {}
        for texts in sorted(fields.values(), key=len, reverse=True):
            found |= texts
        return found


class TaskFiles:
    """A folder of files.

    Args:
        folder: where they are.
        catalog: which tasks and groups there are.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, folder: Path, catalog: Catalog) -> None:
        if not folder.is_dir():
            raise DataError(f"no folder {folder}; expected one with files such as piqa_validation.jsonl.gz")
        self.folder = folder
        self.catalog = catalog
        self.last: TaskFile | None = None
        """The file that was asked for last, for messages."""
        self._files: dict[Path, TaskFile] = {}

    def find(self, name: str, split: str) -> TaskFile | None:
        """The file of a task or group, None where there is none."""
        for path in (self.folder / f"{name}_{split}{ending}" for ending in ENDINGS):
            if path.is_file():
                self.last = self._files[path] = self._files.get(path) or TaskFile(path)
                return self.last
        return None

    def read(self, task: str, source: Source, split: str) -> tuple[TaskFile, list[Row]]:
        """The rows of a task's split, from its own file or that of the nearest group that has one.

        Raises:
            MissingFileError: there is no such file.
            DataError: it cannot be read, or does not tell which rows are those of the task.
        """
        if file := self.find(task, split):
            return file, file.rows
        for group in self.catalog.lineage(task):
            if file := self.find(group, split):
                return file, self._part(file, group, task, source)
        raise MissingFileError(self.missing(task, split))

    def missing(self, task: str, split: str) -> str:
        """What to say where no file has the split."""
        names = [task, *(group for group in self.catalog.lineage(task) if task.startswith(f"{group}_"))]
        text = f"{task}: no file {' or '.join(f'{name}_{split}.jsonl[.gz]' for name in names)} in {self.folder}"
        others = sorted(
            file.name
            for file in self.folder.iterdir()
            if any(re.fullmatch(re.escape(name) + r"_[a-z]+\.jsonl(\.gz)?", file.name) for name in names)
        )
        return text + (f" ({', '.join(others)} is there, but the task wants its split {split!r})" if others else "")

    def _part(self, file: TaskFile, group: str, task: str, source: Source) -> list[Row]:
        names = [source.name, task.removeprefix(f"{group}_"), task, (source.path or "").rpartition("/")[2]]
        sources = {self.catalog.source(leaf) for leaf in self.catalog.leaves(group)}
        if len(sources) == 1:  # one data set for all, which the tasks divide by themselves
            return file.rows
        for name in filter(None, names):  # likeliest first
            if _plain(name) in file.subjects:
                return file.subjects[_plain(name)]
        raise DataError(
            f"{file.path}: no field, such as subject, says {names[0] or names[1]!r}, so the rows of {task} cannot "
            f"be told from those of the others in {group}; add one, or give a file for each task"
        )


class LocalSplits(dict[str, Dataset]):
    """What a task takes for its data set: a dictionary of splits, read when asked for.

    lm-eval asks for the split of the examples in the prompt even where a task is given none. If there is no file for
    it, the split that is measured stands in, and `missing` says so: `check` refuses it where examples are wanted.
    """

    def __init__(self, files: TaskFiles, task: ConfigurableTask) -> None:
        super().__init__()
        self._files = files
        self._task = task
        self._name = files.catalog.name_of(task)
        self.digests: dict[str, str] = {}
        self.missing: list[str] = []

    def __missing__(self, split: str) -> Dataset:
        source = Source(self._task.DATASET_PATH, self._task.DATASET_NAME)
        measured = _measured_split(self._task)
        try:
            file, rows = self._files.read(self._name, source, split)
        except MissingFileError:
            if split == measured:
                raise
            self.missing.append(split)
            return self[measured]
        self.digests[split] = file.digest
        self[split] = _dataset(rows, file.path)
        return self[split]

    def check(self, examples: int) -> None:
        """Raise DataError if a prompt is to hold examples of a split that has no file."""
        if examples and self.missing:
            why = f"{examples} examples in each prompt come from this split; 0 examples need none"
            raise DataError(f"{self._files.missing(self._name, self.missing[0])}; {why}", hint="fewer_examples")


def _measured_split(task: Task) -> str:
    """The split that lm-eval measures: test if the task has one, else validation."""
    if task.has_test_docs():
        return getattr(task.config, "test_split", None) or "test"
    return getattr(task.config, "validation_split", None) or "validation"


def _dataset(rows: list[Row], path: Path) -> Dataset:
    """Rows as lm-eval wants them; text stays text, also where it looks like a date."""
    fields = dict.fromkeys(field for row in rows for field in row)
    try:
        return Dataset.from_dict({field: [row.get(field) for row in rows] for field in fields})
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's are ValueErrors
        raise DataError(f"{path}: each field must have values of one type; {_first_line(error)}") from error


def _read_rows(path: Path) -> list[Row]:
    try:
        with path.open("rb") as raw:
            rows = [row for row, _ in read_json_lines(str(path), raw)]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not rows:
        raise DataError(f"{path} is empty; expected one JSON object a line")
    return rows


def _plain(text: str) -> str:
    """Names of subjects are spelt in several ways: "Counting & Probability" is counting_and_probability."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower().replace("&", " and ")).strip("_")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
