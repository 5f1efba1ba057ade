"""Finished cells of a recall evaluation, kept in a file so that an interrupted one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lolcats.errors import LolcatsError
from lolcats.files import write_text


@dataclass
class Cell:
    """What one variant scores at one task and length."""

    variant: str
    task: str
    length: int
    score: float
    """Mean of the samples, 0 to 1."""
    by_depth: list[float | None]
    """Means of the ranges of depth, None where a range has no sample; empty for tasks with many needles."""
    samples: list[dict[str, Any]]
    """Prompt tokens, depths, answers, output and score of each prompt."""


class Progress:
    """Finished cells in a file; what an interrupted evaluation goes on from.

    Args:
        path: the file; None keeps nothing.
        settings: all that numbers depend on. Cells of a file with other settings are not used.

    Raises:
        LolcatsError: the file belongs to an evaluation with other settings, or is none.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.cells: dict[tuple[str, str, int], Cell] = {}
        if path is not None and path.exists():
            self.cells = {(cell.variant, cell.task, cell.length): cell for cell in self._read(path)}

    def _read(self, path: Path) -> list[Cell]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known, cells = dict(content["settings"]), [Cell(**values) for values in content["cells"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LolcatsError(f"{path} is not the progress of a recall evaluation; move it away") from error
        for name in [*known, *self.settings]:
            if known.get(name) != self.settings.get(name):
                raise LolcatsError(
                    f"{path} was begun with {name} {known.get(name)!r}, and now it is {self.settings.get(name)!r}; "
                    "repeat the old command, remove that file, or write to another one"
                )
        return cells

    def add(self, cell: Cell) -> None:
        """Keep a finished cell."""
        self.cells[cell.variant, cell.task, cell.length] = cell
        if self.path is not None:
            content = {"settings": self.settings, "cells": [asdict(kept) for kept in self.cells.values()]}
            write_text(self.path, json.dumps(content) + "\n")

    def finish(self) -> None:
        """Remove the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
