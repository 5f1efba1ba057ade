"""The files that `evaluate`, `benchmark`, `recall` and sweeps write as JSON, read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lolcats.errors import LolcatsError, first_problem
from lolcats.evaluation.harness import Row
from lolcats.evaluation.recall import Cell
from lolcats.files import read_json_object

THEN = "leave it out, or write it again"


class _File(BaseModel):
    """What a verb has measured of a model."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    file: Path
    model: str | None = None
    """As the verb was given it; None where the file's place says it."""


class Score(BaseModel):
    """What one variant scores on a text; None is a number that was not finite, or is not known."""

    perplexity: float | None
    kl: float | None = None
    tokens: int | None = None
    by_position: dict[str, float | None] = {}
    context: int | None = None


class EvaluateFile(_File):
    """Of `lolcats evaluate`."""

    length: int
    scores: dict[str, Score]


class BenchmarkFile(_File):
    """Of `lolcats benchmark`."""

    rows: list[Row]


class RecallFile(_File):
    """Of `lolcats recall`, or the recall of a sweep."""

    samples: int | None = None
    cells: list[Cell]


class _Record(BaseModel):
    cell: Cell


class _Rows(BaseModel):
    rows: list[Row]


class _SweepFile(BaseModel):
    recall: dict[str, _Record] = {}
    tasks: dict[str, _Rows] = {}


AnyFile = EvaluateFile | BenchmarkFile | RecallFile


def read_measured(file: Path) -> list[AnyFile]:
    """What a file holds; empty where it is no file of numbers that a report reads.

    Raises:
        LolcatsError: it looks like one and is broken, or cannot be read.
    """
    content = read_json_object(file, THEN)
    try:
        return _read(file, content)
    except (ValidationError, RecursionError, OverflowError) as error:
        raise LolcatsError(f"{file} cannot be used: {first_problem(error)}; {THEN}") from error


def _read(file: Path, content: dict[str, Any]) -> list[AnyFile]:
    named = content | {"file": file}
    if isinstance(content.get("cells"), list):
        return [RecallFile.model_validate(named)]
    if isinstance(content.get("scores"), dict) and "length" in content:
        return [EvaluateFile.model_validate(named)]
    if isinstance(content.get("rows"), list) and isinstance(content.get("results"), dict):
        return [BenchmarkFile.model_validate(named)]
    if file.parent.name == "measurements":
        found = _SweepFile.model_validate(content)
        cells, rows = [r.cell for r in found.recall.values()], [row for t in found.tasks.values() for row in t.rows]
        files: list[AnyFile] = [RecallFile(file=file, cells=cells)] if cells else []
        return [*files, *([BenchmarkFile(file=file, rows=rows)] if rows else [])]
    return []
