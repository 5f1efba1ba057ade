"""Heat maps of recall: length of the text x depth of the needle, a panel a task and variant."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lolcats.errors import LolcatsError
from lolcats.evaluation.recall.run import Cell
from lolcats.evaluation.recall.tasks import TASKS
from lolcats.files import atomic_file

SUFFIXES = (".png", ".pdf", ".svg")
_DARK = 0.55  # cells below it get light figures


def check_figure(file: Path) -> None:
    """Raise LolcatsError where no picture could be written.

    Raises:
        LolcatsError: no matplotlib, no folder, or another kind of file.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise LolcatsError('plots need matplotlib: pip install "lolcats[report]"')
    if file.suffix.lower() not in SUFFIXES:
        raise LolcatsError(f"cannot plot into {file}; give a name that ends in {', '.join(SUFFIXES)}")
    if not file.resolve().parent.is_dir():
        raise LolcatsError(f"no folder {file.parent} to write {file.name} into")


def check_plot(file: Path, tasks: Sequence[str]) -> None:
    """Raise LolcatsError where `plot_recall` could not draw; meant for before an evaluation.

    Raises:
        LolcatsError: see `check_figure`; or there is no task with a single needle.
    """
    check_figure(file)
    if not any(TASKS[task].by_depth for task in tasks):
        possible = ", ".join(name for name, task in TASKS.items() if task.by_depth)
        raise LolcatsError(f"{', '.join(tasks)} hide many needles at once and have no depth to plot; add {possible}")


def plot_recall(cells: Sequence[Cell], file: Path, label: Callable[[str], str] = str) -> None:
    """Draw the mean score of every (length, range of depth), in percent.

    Args:
        cells: of any tasks; those without a depth are left out.
        file: a .png, .pdf or .svg file, replaced if it is there.
        label: name of a variant for people.

    Raises:
        LolcatsError: see `check_plot`; or the file cannot be written.
    """
    shown = [cell for cell in cells if cell.by_depth]
    check_plot(file, [cell.task for cell in cells])
    import matplotlib  # pyright: ignore[reportMissingImports]  (an extra)

    with matplotlib.rc_context({"font.size": 8}):
        _draw(shown, file, label)


def _draw(cells: Sequence[Cell], file: Path, label: Callable[[str], str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]  (an extra)
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  (an extra)

    tasks, variants = (list(dict.fromkeys(getattr(c, name) for c in cells)) for name in ("task", "variant"))
    lengths, depths = sorted({cell.length for cell in cells}), len(cells[0].by_depth)
    edges = [round(100 * i / depths) for i in range(depths + 1)]
    known = {(cell.task, cell.variant, cell.length): cell.by_depth for cell in cells}
    size = (1.2 + 2.0 * len(variants), 0.9 + len(tasks) * (0.9 + 0.22 * depths))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tasks), len(variants), squeeze=False)
    image = None
    for row, task in enumerate(tasks):
        for column, variant in enumerate(variants):
            image = _panel(panels[row, column], [known[task, variant, length] for length in lengths])
            panels[row, column].set_xticks(range(len(lengths)), [str(n) for n in lengths], rotation=45)
            if row == 0:
                panels[row, column].set_title(label(variant), fontsize=8)
            panels[row, column].set_yticks([])
        panels[row, 0].set_ylabel(f"{task}\ndepth of the needle, %")
        panels[row, 0].set_yticks(range(depths), [f"{a}-{b}" for a, b in pairwise(edges)])
    figure.supxlabel("tokens of prompt and answer", fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=panels, label="found, %", shrink=0.8, aspect=30)
    with atomic_file(file) as temporary:
        figure.savefig(temporary, dpi=200, format=file.suffix.removeprefix("."))


def _panel(panel: Any, columns: list[list[float | None]]) -> Any:
    """One heat map from [lengths][depths]; what was not asked stays grey."""
    values = np.array([[np.nan if v is None else 100 * v for v in column] for column in columns]).T
    panel.set_facecolor("0.85")
    edges = [np.arange(size + 1) - 0.5 for size in values.shape[::-1]]
    image = panel.pcolormesh(*edges, values, vmin=0, vmax=100, cmap="viridis", edgecolors="white", linewidth=0.5)
    panel.invert_yaxis()
    for (depth, length), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "white" if value < 100 * _DARK else "black"
            panel.text(length, depth, f"{value:.0f}", ha="center", va="center", color=color, fontsize=6)
    return image
