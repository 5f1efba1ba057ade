"""A picture for each swept axis: perplexity and distance from the teacher along it."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolcats.errors import LolcatsError
from lolcats.sweep.results import SEED, Row, Table, show_value
from lolcats.variants import short_label

DRAWN = ("training_free", "transfer", "student", "window_only")
"""What is drawn where there is one axis; where there are more, the student alone, a line for each other setting."""
MOST_LINES = 10
LOG_RATIO = 4.0
"""Values this far apart are drawn on a logarithmic scale."""
MISSING = 'plots need matplotlib: pip install "lolcats[report]"'
_Series = tuple[str, str, list[Any], list[float], list[float]]  # label, colour, places on the axis, values, SDs


def draw_plots(table: Table, folder: Path) -> list[Path]:
    """Write plot-AXIS.png for each axis with at least two values; `seed` alone counts as an axis.

    Returns:
        The files. Axes without two finished runs are left out.

    Raises:
        LolcatsError: matplotlib is not installed, or a file cannot be written.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise LolcatsError(MISSING) from error
    only_seeds = list(table.axes) == [SEED]
    rows = [row for row in (table.runs if only_seeds else table.rows) if "perplexity.student" in row.columns]
    files = []
    for axis in table.axes if only_seeds else table.shown_axes:
        values = [value for value in table.axes[axis] if any(row.settings[axis] == value for row in rows)]
        if len(values) < 2:
            continue
        figure = figures.Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        _panel(left, table, rows, axis, values, "perplexity")
        _panel(right, table, rows, axis, values, "kl")
        figure.suptitle(
            f"{table.name}: {axis}" + (" (mean and SD over seeds)" if table.means and not only_seeds else "")
        )
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        files.append(folder / f"plot-{re.sub(r'[^A-Za-z0-9._-]', '-', axis)}.png")
        try:
            figure.savefig(files[-1], dpi=130)
        except OSError as error:
            raise LolcatsError(f"cannot write {files[-1]}: {error.strerror}") from error
    return files


def _panel(axes: Any, table: Table, rows: Sequence[Row], axis: str, values: Sequence[Any], section: str) -> None:
    """Draw one quantity."""
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values) and axis != SEED
    others = [name for name in table.shown_axes if name != axis]
    series = _by_setting(rows, axis, others, section) if others else _by_variant(rows, axis, section)
    if numeric:
        for label, color, places, means, spreads in series:
            bars = spreads if any(spreads) else None
            axes.errorbar(places, means, bars, marker="o", capsize=3, label=label, color=color)
        if min(values) > 0 and max(values) / min(values) >= LOG_RATIO:
            axes.set_xscale("log")
        axes.set_xticks(values, [show_value(value) for value in values], rotation=30 if len(values) > 6 else 0)
        axes.minorticks_off()
    else:
        _bars(axes, series, values)
    teacher = [row.columns.get("perplexity.teacher") for row in rows]
    known = [value for value in teacher if value is not None]
    if section == "perplexity" and known and max(known) < 1.1 * min(known):
        axes.axhline(sum(known) / len(known), color="black", linestyle="--", linewidth=1, label="teacher")
    numbers = [value for *_, means, _ in series for value in means if value > 0]
    if numbers and max(numbers) / min(numbers) >= LOG_RATIO:
        axes.set_yscale("log")
    axes.set_xlabel(axis)
    whose = " of the student" if others else ""
    axes.set_ylabel(f"KL{whose} to the teacher, nats a token" if section == "kl" else f"perplexity{whose}")
    axes.grid(alpha=0.3)


def _by_variant(rows: Sequence[Row], axis: str, section: str) -> list[_Series]:
    lines = [_series(short_label(name), i, rows, axis, f"{section}.{name}") for i, name in enumerate(DRAWN)]
    return [line for line in lines if line is not None]


def _by_setting(rows: Sequence[Row], axis: str, others: Sequence[str], section: str) -> list[_Series]:
    """The student's lines, one for each point of the other axes."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        label = ", ".join(f"{_short(name)} {show_value(row.settings[name])}".strip() for name in others)
        groups.setdefault(label, []).append(row)
    chosen = enumerate(list(groups.items())[:MOST_LINES])
    lines = [_series(label, i, group, axis, f"{section}.student") for i, (label, group) in chosen]
    return [line for line in lines if line is not None]


def _short(axis: str) -> str:
    return "" if axis == "run" else axis.rpartition(".")[2]


def _series(label: str, number: int, rows: Sequence[Row], axis: str, column: str) -> _Series | None:
    found = [(row.settings[axis], row.columns[column], row.spread.get(column)) for row in rows if _known(row, column)]
    if not found:
        return None
    places, means = [value for value, _, _ in found], [float(mean or 0) for _, mean, _ in found]
    return label, f"C{number}", places, means, [spread or 0.0 for *_, spread in found]


def _known(row: Row, column: str) -> bool:
    value = row.columns.get(column)
    return value is not None and math.isfinite(value)


def _bars(axes: Any, series: Sequence[_Series], values: Sequence[Any]) -> None:
    """Groups of bars, one group for each value."""
    width = 0.8 / max(1, len(series))
    for number, (label, color, places, means, spreads) in enumerate(series):
        shift = (number - (len(series) - 1) / 2) * width
        positions = [list(values).index(place) + shift for place in places]
        bars = spreads if any(spreads) else None
        axes.bar(positions, means, width, yerr=bars, capsize=3, label=label, color=color)
    names = [show_value(value) or "none" for value in values]
    crowded = sum(map(len, names)) > 40
    slant: dict[str, Any] = {"rotation": 30, "ha": "right"} if crowded else {}
    axes.set_xticks(range(len(values)), names, **slant)
