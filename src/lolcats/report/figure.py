"""A figure of the page: a chart or a picture, what it says in words, and the numbers behind it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SHOWN_ROWS = 100
"""Of a table on the page; the CSV file has all."""


@dataclass
class Table:
    """Numbers by column, as they are: None is one that is not there."""

    columns: list[str]
    rows: list[list[Any]]

    def to_csv(self) -> str:
        """All rows, numbers to the last digit."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if value is None else value for value in row] for row in self.rows)
        return out.getvalue()

    def without_same(self, name: str) -> Table:
        """The table without a column that says the same in all rows, as the run does where there is one."""
        place = self.columns.index(name) if name in self.columns else -1
        if place < 0 or len({row[place] for row in self.rows}) > 1:
            return self
        rows = [[value for n, value in enumerate(row) if n != place] for row in self.rows]
        return Table([column for n, column in enumerate(self.columns) if n != place], rows)

    @property
    def numeric(self) -> list[bool]:
        """Whether a column holds numbers alone."""
        columns = range(len(self.columns))
        return [all(row[n] is None or isinstance(row[n], int | float) for row in self.rows) for n in columns]


@dataclass
class Figure:
    """One figure; without chart and picture it is a table."""

    key: str
    """Of letters, digits and _, for its place on the page and its files."""
    title: str
    text: str
    """How to read it."""
    alt: str
    """What it shows, for those who do not see it."""
    table: Table
    spec: dict[str, Any] | None = None
    """A Vega-Lite chart."""
    picture: bytes | None = None
    """PNG."""
    cells: int = 0
    """Where a chart has several views: pixels that each needs; the page puts as many in a row as fit."""


@dataclass
class Section:
    """A part of the page under a heading of its own."""

    key: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    note: str = ""
    """What is not in it, and why."""


@dataclass
class Lacking:
    """A part of the page for which there is nothing to show."""

    title: str
    text: str
    command: str = ""
    """What measures it, "" where nothing does any more."""


def show_cell(value: Any) -> str:
    """A cell of a table on the page."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        size = abs(value)
        if size < 1e6 and value.is_integer():
            return f"{value:,.0f}"
        return f"{value:,.2f}" if 100 <= size < 1e6 else f"{value:.3g}" if size < 1e-3 else f"{value:#,.4g}"
    return str(value)


def spread_words(values: Sequence[float | None]) -> str:
    """Smallest and largest of some numbers, in words."""
    known = [value for value in values if value is not None]
    if not known:
        return "no numbers"
    low, high = min(known), max(known)
    return show_cell(low) if low == high else f"{show_cell(low)} to {show_cell(high)}"
