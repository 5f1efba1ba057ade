"""A picture of `points`: perplexity and recall against the memory of a text, a line a kind of layer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolcats.errors import LolcatsError
from lolcats.evaluation.recall.plot import check_figure
from lolcats.files import atomic_file, write_text
from lolcats.sweep.points import TEACHER, Point, to_csv

MARKERS = "osD^vP*X<>"
LOG_RATIO = 4.0
"""Perplexities this far apart are drawn on a logarithmic scale."""


def plot_memory(points: Sequence[Point], file: Path) -> list[Path]:
    """Draw points, and write them beside the picture as CSV.

    Args:
        points: see `read_points`.
        file: a .png, .pdf or .svg file; it and the .csv file are replaced if they are there.

    Returns:
        Both files.

    Raises:
        LolcatsError: matplotlib is not installed, a file cannot be written, or no point has a number.
    """
    check_figure(file)
    panels = [name for name in ("perplexity", *_tasks(points)) if _lines(points, name).keys() - {TEACHER}]
    if not panels:
        raise LolcatsError("nothing to plot: no student has a perplexity or recall")
    import matplotlib  # pyright: ignore[reportMissingImports]  (an extra)

    with matplotlib.rc_context({"font.size": 9}):
        _draw(points, panels, file)
    table = file.with_suffix(".csv")
    write_text(table, to_csv(points))
    return [file, table]


def _tasks(points: Sequence[Point]) -> dict[str, list[str]]:
    """Task of recall -> its cells, TASK.LENGTH, by length."""
    found: dict[str, list[str]] = {}
    cells = {cell for point in points for cell in point.recall}
    for cell in sorted(cells, key=lambda cell: (cell.rpartition(".")[0], int(cell.rpartition(".")[2]))):
        found.setdefault(cell.rpartition(".")[0], []).append(cell)
    return found


def _value(point: Point, panel: str, cells: Sequence[str]) -> float | None:
    """Perplexity, or the mean over the lengths of a task in percent, of a point that has them all."""
    if panel == "perplexity":
        return point.perplexity
    return 100 * statistics.fmean(point.recall[c] for c in cells) if all(c in point.recall for c in cells) else None


def _lines(points: Sequence[Point], panel: str) -> dict[str, dict[float, list[float]]]:
    """Line -> KV tokens -> values, in order; of the teacher, all are at 0."""
    cells, found = _tasks(points).get(panel, []), {}
    for point in sorted(points, key=lambda point: point.kv_tokens or 0.0):
        if (value := _value(point, panel, cells)) is not None:
            found.setdefault(point.line, {}).setdefault(point.kv_tokens or 0.0, []).append(value)
    return found


def _draw(points: Sequence[Point], panels: Sequence[str], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]  (an extra)
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  (an extra)

    names = [name for name in dict.fromkeys(point.line for point in points) if name != TEACHER]
    figure = Figure(figsize=(0.6 + 4.2 * len(panels), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    handles: dict[str, Any] = {}
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        lines = _lines(points, panel)
        handles = _panel(axes, lines, names) | handles
        lengths = [int(cell.rpartition(".")[2]) for cell in _tasks(points).get(panel, [])]
        axes.set_title(panel if not lengths else f"{panel}, mean over {_words(lengths)} tokens", fontsize=9)
        axes.set_ylabel("% found" if lengths else "perplexity")
        if lengths:
            axes.set_ylim(-3, 103)
        elif max(values := [v for line in lines.values() for vs in line.values() for v in vs]) >= LOG_RATIO * min(
            values
        ):
            axes.set_yscale("log")
        axes.set_xlabel("memory of a text, KV tokens")
    shown = [name for name in (*names, TEACHER) if name in handles]
    columns = min(len(shown), 2 + len(panels) - 1)
    figure.legend([handles[n] for n in shown], shown, loc="outside lower center", ncols=columns, frameon=False)
    with atomic_file(file) as temporary:
        figure.savefig(temporary, dpi=150, format=file.suffix.removeprefix("."))


def _panel(axes: Any, lines: dict[str, dict[float, list[float]]], names: Sequence[str]) -> dict[str, Any]:
    """One panel; the first line drawn of each name, for the legend."""
    handles: dict[str, Any] = {}
    means = {name: {x: statistics.fmean(values) for x, values in points.items()} for name, points in lines.items()}
    for name, points in means.items():
        if name == TEACHER:
            handles[name] = axes.axhline(points[0.0], color="black", linestyle="--", linewidth=1)
            continue
        number = names.index(name)
        look = {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
        handles[name] = axes.plot(list(points), list(points.values()), **look)[0]
        for x, values in lines[name].items():
            axes.plot([x] * len(values), values, linestyle="", alpha=0.4, **look)
    places = sorted({x for name, points in lines.items() if name != TEACHER for x in points})
    axes.set_xscale("log", base=2)
    ticks = _ticks(places)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(places) / 1.2, max(places) * 1.2)
    axes.grid(alpha=0.3)
    return handles


def _ticks(places: Sequence[float]) -> list[float]:
    """Powers of two about the places, or the places themselves where these are too close together."""
    low, high = min(places) / 1.2, max(places) * 1.2
    powers = [float(2**power) for power in range(64) if low <= 2**power <= high]
    return powers if len(powers) > 1 else sorted({float(round(place)) for place in places})


def _words(numbers: Sequence[int]) -> str:
    *first, last = [f"{number:,}" for number in numbers]
    return f"{', '.join(first)} and {last}" if first else last
