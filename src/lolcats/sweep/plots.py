"""A picture for each swept axis: perplexity and distance from the teacher along it."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolcats.errors import LolcatsError
from lolcats.sweep.job import RUN, SEED
from lolcats.sweep.results import Row, Table, show_value
from lolcats.variants import short_label

DRAWN = ("training_free", "transfer", "student", "window_only")
"""What is drawn where there is one axis; where there are more, the student alone, a line for each other setting."""
MOST_LINES = 10
LOG_RATIO = 4.0
"""Values this far apart are drawn on a logarithmic scale."""
MISSING = 'plots need matplotlib: pip install "lolcats[report]"'


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
        _draw(left, table, rows, axis, values, "perplexity")
        _draw(right, table, rows, axis, values, "kl")
        seeds = " (mean and SD over seeds)" if table.means and not only_seeds else ""
        figure.suptitle(f"{table.name}: {axis}{seeds}")
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        files.append(folder / f"plot-{re.sub(r'[^A-Za-z0-9._-]', '-', axis)}.png")
        try:
            figure.savefig(files[-1], dpi=130)
        except OSError as error:
            raise LolcatsError(f"cannot write {files[-1]}: {error.strerror}") from error
    return files


def _draw(axes: Any, table: Table, rows: Sequence[Row], axis: str, values: list[Any], section: str) -> None:
    """Draw one quantity: lines along an axis of numbers, else groups of bars, one for each value."""
    others = [name for name in table.shown_axes if name != axis]
    lines = _lines(rows, axis, others, section)
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values) and axis != SEED
    width = 0.8 / max(1, len(lines))
    for number, (label, (color, points)) in enumerate(lines.items()):
        places, means, spreads = zip(*points, strict=True)
        look = {"yerr": spreads if any(spreads) else None, "capsize": 3, "label": label, "color": color}
        if numeric:
            axes.errorbar(places, means, marker="o", **look)
        else:
            shift = (number - (len(lines) - 1) / 2) * width
            axes.bar([values.index(place) + shift for place in places], means, width, **look)
    names = [show_value(value) or "none" for value in values]
    if numeric:
        if min(values) > 0 and max(values) / min(values) >= LOG_RATIO:
            axes.set_xscale("log")
        axes.set_xticks(values, names, rotation=30 if len(values) > 6 else 0)
        axes.minorticks_off()
    else:
        crowded = sum(map(len, names)) > 40
        axes.set_xticks(range(len(values)), names, **({"rotation": 30, "ha": "right"} if crowded else {}))
    known = [value for row in rows if (value := row.columns.get("perplexity.teacher")) is not None]
    if section == "perplexity" and known and max(known) < 1.1 * min(known):
        axes.axhline(sum(known) / len(known), color="black", linestyle="--", linewidth=1, label="teacher")
    numbers = [mean for _, points in lines.values() for _, mean, _ in points if mean > 0]
    if numbers and max(numbers) / min(numbers) >= LOG_RATIO:
        axes.set_yscale("log")
    whose = " of the student" if others else ""
    axes.set_xlabel(axis)
    axes.set_ylabel(f"KL{whose} to the teacher, nats a token" if section == "kl" else f"perplexity{whose}")
    axes.grid(alpha=0.3)


def _lines(
    rows: Sequence[Row], axis: str, others: Sequence[str], section: str
) -> dict[str, tuple[str, list[tuple[Any, float, float]]]]:
    """Label -> colour and (place on the axis, value, SD) of a variant, or of the student with other settings."""
    found: dict[str, list[tuple[Any, float, float]]] = {}
    for column in [f"{section}.{name}" for name in (("student",) if others else DRAWN)]:
        for row in rows:
            words = [(other.rpartition(".")[2] * (other != RUN), show_value(row.settings[other])) for other in others]
            label = ", ".join(" ".join(pair).strip() for pair in words) or short_label(column.partition(".")[2])
            points, value = found.setdefault(label, []), row.columns.get(column)
            if value is not None and math.isfinite(value):
                points.append((row.settings[axis], value, row.spread.get(column) or 0.0))
    chosen = list(found.items())[:MOST_LINES]
    return {label: (f"C{number}", points) for number, (label, points) in enumerate(chosen) if points}
