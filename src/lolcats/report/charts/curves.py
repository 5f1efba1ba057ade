"""Training: loss and what else was written at each step and at each validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from lolcats.report.charts.theme import base, choice, chosen, finished, joined, look, number_scale, share, thinned
from lolcats.report.figure import Figure, Table, spread_words
from lolcats.report.subject import Subject
from lolcats.variants import TRAINED_WINDOW

STAGES = {
    "transfer": "Stage 1: attention transfer", "finetune": "Stage 2: fine-tuning", TRAINED_WINDOW: "Trained window",
}  # fmt: skip
NOT_MEASURES = {"stage", "step", "tokens"}
FIRST = "loss"
FEWEST_POINTS, MOST_POINTS = 40, 400
"""Of a line on the page; the CSV file has all."""
ALL_POINTS = 4_000
"""Of all lines of a chart, the measures to choose from among them."""


def curve_figures(subjects: Sequence[Subject]) -> Iterator[Figure]:
    """A figure for each stage of which anything was written."""
    stages = dict.fromkeys(str(line.get("stage")) for subject in subjects for line in subject.metrics)
    for stage in sorted(stages, key=lambda name: (*STAGES, name).index(name)):
        rows = [row for subject in subjects for row in _rows(subject, stage)]
        if rows:
            yield _figure(stage, rows)


def _rows(subject: Subject, stage: str) -> Iterator[dict[str, Any]]:
    """A row for each number that a step or a validation of a stage gave."""
    for line in subject.metrics:
        if line.get("stage") != stage:
            continue
        for name, value in line.items():
            if name in NOT_MEASURES or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            kind = "validation" if name.startswith("validation_") else "training"
            yield {
                "run": subject.name, "kind": kind, "measure": name.removeprefix("validation_"), "step": line["step"],
                "tokens": line.get("tokens"), "value": value,
            }  # fmt: skip


def _figure(stage: str, rows: list[dict[str, Any]]) -> Figure:
    measures = sorted({row["measure"] for row in rows}, key=lambda name: (name != FIRST, name))
    runs, kinds = (list(dict.fromkeys(row[name] for row in rows)) for name in ("run", "kind"))
    lines = {(run, kind): f"{run}, {kind}" if len(runs) > 1 else kind for run in runs for kind in kinds}
    drawn = _drawn(rows, lines)
    losses = [row["value"] for row in rows if row["measure"] == FIRST]
    title = f"{STAGES.get(stage, stage)}, step by step"
    words = f"{title}: loss of {', '.join(runs)} over {spread_words([row['step'] for row in rows])} steps, "
    words += f"{spread_words(losses)}."
    chart = base(drawn)
    if len(measures) > 1:
        chart = chart.transform_filter(chosen("measure"))
    layers = joined(
        chart,
        look("line", list(lines.values())),
        x=alt.X("step:Q", title="step"),
        y=alt.Y("value:Q", title=None, scale=_scale(losses, rows)),
        tooltip=["line:N", "measure:N", "step:Q", "tokens:Q", "value:Q"],
    )
    layers = layers.add_params(choice("choose_measure", "show", measures)) if len(measures) > 1 else layers
    return Figure(
        key=f"training_{stage}",
        title=title,
        text="What a step gave on the text of training, and what validations gave on text that was held out.",
        alt=words,
        table=Table(list(rows[0]), [list(row.values()) for row in rows]),
        spec=finished(layers, words),
    )


def _drawn(rows: Sequence[dict[str, Any]], lines: dict[tuple[str, str], str]) -> list[dict[str, Any]]:
    """As many rows as the page has room for, evenly, each with the name of the line that (run, kind) is drawn as."""
    parts: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault((row["run"], row["kind"], row["measure"]), []).append(row)
    most = share(ALL_POINTS, sum(len(part) > FEWEST_POINTS for part in parts.values()), FEWEST_POINTS, MOST_POINTS)
    return [
        {"line": lines[run, kind], "measure": measure, **{name: row[name] for name in ("step", "tokens", "value")}}
        for (run, kind, measure), part in parts.items()
        for row in thinned(part, most)
    ]


def _scale(losses: Sequence[float], rows: Sequence[dict[str, Any]]) -> alt.Scale:
    """Logarithmic where the loss asks for it and no other measure has values that such a scale lacks."""
    return number_scale(losses) if all(row["value"] > 0 for row in rows) else number_scale([])
