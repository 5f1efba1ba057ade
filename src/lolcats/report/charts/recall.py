"""What was found again, by length of the text and depth of the needle."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import altair as alt

from lolcats.evaluation.recall import Cell
from lolcats.evaluation.recall.plot import plot_recall
from lolcats.report.charts.theme import PALE, base, choice, chosen, finished
from lolcats.report.figure import Figure, Table
from lolcats.report.subject import Subject
from lolcats.variants import ordered, short_label

MOST_PICTURES = 4
"""Files whose maps are shown side by side; the first figure has those of all."""


def recall_figures(subjects: Sequence[Subject]) -> Iterator[Figure]:
    """A map to choose from, all scores as a table, and the maps of each file side by side."""
    rows = [row for subject in subjects for row in _cells(subject)]
    if not rows:
        return
    maps = [row for subject in subjects for row in _depths(subject)]
    if maps:
        yield _map_figure(maps)
    yield _score_table(rows)
    files = [(subject.name, file) for subject in subjects for file in subject.recalls]
    for number, (run, file) in enumerate(files[:MOST_PICTURES]):
        if cells := _whole(file.cells):
            yield _still(f"recall_maps_{number}", run, file.file.name, cells)


def _cells(subject: Subject) -> Iterator[dict[str, Any]]:
    cells = subject.cells()
    for variant in ordered(dict.fromkeys(variant for variant, _, _ in cells)):
        for (name, task, length), cell in cells.items():
            if name == variant:
                yield {"run": subject.name, "variant": variant, "task": task, "length": length, "cell": cell}


def _depths(subject: Subject) -> Iterator[dict[str, Any]]:
    """A row for each range of depth that was asked for."""
    for row in _cells(subject):
        cell: Cell = row["cell"]
        edges = [round(100 * n / max(1, len(cell.by_depth))) for n in range(len(cell.by_depth) + 1)]
        for (low, high), score in zip(pairwise(edges), cell.by_depth, strict=True):
            if score is not None:
                yield {k: v for k, v in row.items() if k != "cell"} | {
                    "depth_from": low, "depth_to": high, "depth": f"{low}-{high}", "score": score,
                }  # fmt: skip


def _map_figure(rows: list[dict[str, Any]]) -> Figure:
    """One map, of a run, task and variant to choose."""
    asked = list(dict.fromkeys((row["run"], row["task"]) for row in rows))
    several = len({run for run, _ in asked}) > 1
    labels = {pair: f"{pair[0]}: {pair[1]}" if several else pair[1] for pair in asked}
    variants = sorted(dict.fromkeys(row["variant"] for row in rows), key=lambda name: name != "student")
    drawn = [
        {"asked": labels[row["run"], row["task"]], "length": f"{row['length']:,}", "found": 100 * row["score"],
         **{name: row[name] for name in ("variant", "depth", "depth_from")}}
        for row in rows
    ]  # fmt: skip
    lengths = [f"{length:,}" for length in sorted({row["length"] for row in rows})]
    student = [row["score"] for row in rows if row["variant"] == variants[0]]
    words = f"Recall by length and depth: {variants[0]} finds {100 * sum(student) / len(student):.0f} % over all of "
    words += f"{', '.join(lengths)} tokens."
    chart = base(drawn).transform_filter(chosen("asked", "variant"))
    where = {
        "x": alt.X("length:O", sort=lengths, title="tokens of prompt and answer", axis=alt.Axis(labelAngle=0)),
        "y": alt.Y("depth:O", sort=alt.EncodingSortField("depth_from"), title="depth of the needle, %"),
    }
    color = alt.Color("found:Q", scale=alt.Scale(domain=[0, 100], range=PALE), legend=alt.Legend(title="found, %"))
    boxes = chart.mark_rect(stroke="#999", strokeWidth=0.5).encode(
        color=color, tooltip=["asked:N", "variant:N", "length:N", "depth:N", "found:Q"], **where
    )
    figures = chart.mark_text(color="#000").encode(text=alt.Text("found:Q", format=".0f"), **where)
    layers = alt.layer(boxes, figures).add_params(
        choice("choose_variant", "of", variants, [short_label(name) for name in variants]),
        choice("choose_asked", "asked", list(labels.values())),
    )
    columns = ["run", "variant", "task", "length", "depth_from", "depth_to", "score"]
    return Figure(
        key="recall_by_depth",
        title="Recall by length and depth",
        text="The share of needles that was found, in %, by where in the text the needle lay.",
        alt=words,
        table=Table(columns, [[row[name] for name in columns] for row in rows]),
        spec=finished(layers, words),
    )


def _score_table(rows: list[dict[str, Any]]) -> Figure:
    """A row a run, task and length, a column a variant; in percent."""
    variants = ordered(dict.fromkeys(row["variant"] for row in rows))
    known = {(row["run"], row["task"], row["length"], row["variant"]): row["cell"].score for row in rows}
    places = sorted(dict.fromkeys(key[:3] for key in known))
    body = [[*place, *(_percent(known.get((*place, name))) for name in variants)] for place in places]
    return Figure(
        key="recall_scores",
        title="All of recall, % found",
        text="The mean over all depths.",
        alt="Recall by run, task and length.",
        table=Table(["run", "task", "tokens", *map(short_label, variants)], body),
    )


def _percent(score: float | None) -> float | None:
    return None if score is None else 100 * score


def _whole(cells: Sequence[Cell]) -> list[Cell]:
    """Cells with depths, of the lengths that all tasks and variants have."""
    shown = [cell for cell in cells if cell.by_depth]
    keys = {(cell.task, cell.variant) for cell in shown}
    lengths = {cell.length for cell in shown}
    have = {(cell.task, cell.variant, cell.length) for cell in shown}
    common = {length for length in lengths if all((*key, length) in have for key in keys)}
    return [cell for cell in shown if cell.length in common]


def _still(key: str, run: str, file: str, cells: list[Cell]) -> Figure:
    """The maps of one file as `lolcats recall` draws them."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "maps.png"
        plot_recall(cells, picture, short_label)
        content = picture.read_bytes()
    variants = ", ".join(dict.fromkeys(short_label(cell.variant) for cell in cells))
    columns = ["variant", "task", "length", "score"]
    return Figure(
        key=key,
        title=f"All maps of {run}, side by side",
        text=f"From {file}. Light is found, dark is lost; the figures are %.",
        alt=f"Heat maps of recall by length and depth, of {variants}; the table has their means.",
        table=Table(columns, [[getattr(cell, name) for name in columns] for cell in cells]),
        picture=content,
    )
