"""A picture of rows: speed and memory against context, a line a model and batch; computed numbers are broken lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lolcats.evaluation.recall.plot import check_figure
from lolcats.evaluation.speed.rows import Row
from lolcats.files import atomic_file

LINES = {"student": "o-", "teacher": "s-"}
Value = Callable[[Row], float | None]
PANELS: dict[str, tuple[Value, Value | None]] = {
    "new tokens a second, all texts; broken: the limit": (
        lambda row: row.decode_speed,
        lambda row: row.batch / row.limit,
    ),
    "tokens of the prompts a second": (lambda row: row.prefill_speed, None),
    "seconds to the first token": (lambda row: row.times.first_token, None),
    "memory of a text, MiB; broken: computed": (
        lambda row: None if row.times.memory is None else row.times.memory / 2**20,
        lambda row: row.text_bytes / 2**20,
    ),
}
"""Title -> what was measured, and what was computed."""


def plot_speed(rows: Sequence[Row], file: Path) -> None:
    """Draw rows.

    Args:
        rows: one or more.
        file: a .png, .pdf or .svg file, replaced if it is there.

    Raises:
        LolcatsError: matplotlib is not installed, or the file cannot be written.
    """
    check_figure(file)
    import matplotlib  # pyright: ignore[reportMissingImports]  (an extra)

    with matplotlib.rc_context({"font.size": 8}):
        _draw(rows, file)


def _draw(rows: Sequence[Row], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]  (an extra)
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]  (an extra)

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    batches = sorted({row.batch for row in rows})
    handles: dict[str, Any] = {}
    for axes, (title, values) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for variant, batch in dict.fromkeys((row.variant, row.batch) for row in rows):
            line = [row for row in rows if (row.variant, row.batch) == (variant, batch)]
            handles |= _lines(axes, line, f"C{batches.index(batch) % 10}", values)
        contexts = sorted({row.context for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [f"{tokens:,}" for tokens in contexts])
        axes.minorticks_off()
        axes.set_yscale("log")
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("tokens of the prompt")
        axes.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    with atomic_file(file) as temporary:
        figure.savefig(temporary, dpi=150, format=file.suffix.removeprefix("."))


def _lines(axes: Any, rows: Sequence[Row], color: str, values: tuple[Value, Value | None]) -> dict[str, Any]:
    """The measured line of a model and batch, and the computed one; handles for the legend."""
    measured, computed = values
    places = sorted(rows, key=lambda row: row.context)
    known = [(row.context, value) for row in places if (value := measured(row)) is not None]
    look = {"color": color, "markersize": 4, "fillstyle": "full" if rows[0].variant == "student" else "none"}
    name = f"{rows[0].variant}, batch {rows[0].batch}"
    handle = axes.plot([x for x, _ in known], [y for _, y in known], LINES[rows[0].variant], **look)[0]
    if computed is None:
        return {name: handle}
    limits = [computed(row) for row in places]
    style = "--" if rows[0].variant == "student" else ":"
    axes.plot([row.context for row in places], limits, style, color=color, linewidth=1, alpha=0.7)
    return {name: handle}
