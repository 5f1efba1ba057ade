"""LoRA as it trains: norm and effective rank of the updates, by layer, projection and step."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from lolcats.report.charts.theme import (
    PALE,
    base,
    choice,
    chosen,
    finished,
    joined,
    look,
    measured,
    number_scale,
    share,
    thinned,
)
from lolcats.report.figure import Figure, Table, spread_words
from lolcats.report.subject import Subject

MEASURES = {"norm": "norm of the update", "effective_rank": "effective rank of the update"}
PACKED = ["step", *MEASURES]
FEWEST_STEPS, MOST_STEPS = 4, 30
"""Of a line on the page."""
ALL_POINTS = 20_000
"""Of all lines of a chart, the layers and runs to choose from among them."""
LAYER = re.compile(r"(?:^|\.)(?P<layer>\d+)\.(?P<rest>(?:.*\.)?(?P<last>[^.]+))$")
"""Number of the layer and name of the projection in the name of a module."""


def lora_figures(subjects: Sequence[Subject]) -> Iterator[Figure]:
    """The last step as a map, all steps of a layer as lines, and what became of the errors of the layers."""
    rows = [row for subject in subjects for row in lora_rows(subject)]
    if rows:
        yield _map(rows)
    if len({row["step"] for row in rows}) > 1:
        yield _lines(rows)
    errors = [row for subject in subjects for row in error_rows(subject)]
    if errors:
        yield _error_figure(errors)


def lora_rows(subject: Subject) -> list[dict[str, Any]]:
    """A row for each module and step: what was written in training, else what the analysis holds."""
    found = [row for line in subject.lora for row in _of_line(subject.name, line)]
    lora = None if subject.analysis is None else subject.analysis.lora
    if found or lora is None:
        return found
    return [
        _row(subject.name, module.layer, module.projection, step, norm, rank)
        for module in lora.modules
        for step, norm, rank in zip(module.steps, module.norm, module.effective_rank, strict=False)
    ]


def _of_line(run: str, line: dict[str, Any]) -> Iterator[dict[str, Any]]:
    modules = line.get("modules")
    known = [
        (place, values)
        for name, values in (modules.items() if isinstance(modules, dict) else ())
        if (place := LAYER.search(name)) is not None and isinstance(values, list) and len(values) >= 2
    ]
    counts = Counter((place["layer"], place["last"]) for place, _ in known)
    for (
        place,
        values,
    ) in known:  # those of a layer that end alike, as those of experts do, by all that follows its number
        alike = counts[place["layer"], place["last"]] > 1
        name = place["rest"] if alike else place["last"]
        yield _row(run, int(place["layer"]), name, line["step"], values[0], values[1])


def error_rows(subject: Subject) -> Iterator[dict[str, Any]]:
    """Errors of linearized layers before and after LoRA: as training wrote them, else as the analysis found them."""
    lines = [line for line in subject.lora if isinstance(line.get("errors"), list)]
    lora = None if subject.analysis is None else subject.analysis.lora
    if len(lines) > 1:
        for when, line in (("before LoRA", lines[0]), ("after LoRA", lines[-1])):
            for layer, error in enumerate(line["errors"]):
                yield {"run": subject.name, "layer": layer, "when": when, "step": line["step"], "error": error}
    elif lora is not None:
        for when, errors in (("before LoRA", lora.error_before_lora), ("after LoRA", lora.error_after_lora)):
            for layer, error in zip(lora.layers, errors, strict=False):
                yield {"run": subject.name, "layer": layer, "when": when, "step": None, "error": error}


def _row(run: str, layer: int, projection: str, step: int, norm: Any, rank: Any) -> dict[str, Any]:
    return {
        "run": run, "layer": layer, "projection": projection, "step": step, "norm": norm, "effective_rank": rank,
    }  # fmt: skip


def _map(rows: list[dict[str, Any]]) -> Figure:
    """Layers x projections at the last step."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    ends = {run: max(row["step"] for row in rows if row["run"] == run) for run in runs}
    last = [row for row in rows if row["step"] == ends[row["run"]]]
    words = (
        f"LoRA at the last step: norms of the updates {spread_words([row['norm'] for row in last])}, effective ranks "
    )
    words += f"{spread_words([row['effective_rank'] for row in last])}."
    chart = measured(base(last).transform_filter(chosen("run")))
    where: dict[str, Any] = {
        "x": alt.X("projection:N", title=None, sort=None, axis=alt.Axis(labelAngle=-40)),
        "y": alt.Y("layer:O", title="layer"),
    }
    color = alt.Color("value:Q", scale=alt.Scale(range=PALE, zero=True), legend=alt.Legend(title=None))
    boxes = chart.mark_rect(stroke="#999", strokeWidth=0.4).encode(
        color=color, tooltip=["layer:O", "projection:N", "value:Q"], **where
    )
    figures = chart.mark_text(color="#000", fontSize=9).encode(text="shown:N", **where)
    layers = alt.layer(boxes, figures).add_params(
        choice("choose_measure", "show", list(MEASURES), list(MEASURES.values())), choice("choose_run", "of", runs)
    )
    return Figure(
        key="lora",
        title="LoRA by layer and projection",
        text="How much each weight was changed: the Frobenius norm of the update, and in how many directions.",
        alt=words,
        table=Table(list(last[0]), [list(row.values()) for row in last]),
        spec=finished(layers, words, width="container", height=max(160, 17 * len({row["layer"] for row in last}))),
    )


def _packed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a module, with a list of each number at as many steps as the page has room for."""
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    for row in rows:
        key = row["run"], row["layer"], row["projection"]
        packed = found.setdefault(key, {n: row[n] for n in ("run", "layer", "projection")} | {n: [] for n in PACKED})
        for name in PACKED:
            packed[name].append(row[name])
    most = share(ALL_POINTS, len(found), FEWEST_STEPS, MOST_STEPS)
    return [row | {name: thinned(row[name], most) for name in PACKED} for row in found.values()]


def _lines(rows: list[dict[str, Any]]) -> Figure:
    """One layer over the steps, a line a projection."""
    runs, layers = (list(dict.fromkeys(row[name] for row in rows)) for name in ("run", "layer"))
    projections = list(dict.fromkeys(row["projection"] for row in rows))
    words = f"LoRA over {spread_words([row['step'] for row in rows])} steps, of {len(layers)} layers and "
    words += f"{', '.join(projections)}."
    chosen_rows = base(_packed(rows)).transform_filter(chosen("layer", "run"))
    chart = joined(
        measured(chosen_rows.transform_flatten(PACKED)),
        look("projection", projections),
        x=alt.X("step:Q", title="step"),
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=True)),
        tooltip=["projection:N", "step:Q", "value:Q"],
    ).add_params(
        choice("choose_layer", "layer", sorted(layers)),
        choice("choose_measure", "show", list(MEASURES), list(MEASURES.values())),
        choice("choose_run", "of", runs),
    )
    return Figure(
        key="lora_steps",
        title="LoRA over the steps",
        text="How the updates of one layer grow while stage 2 trains.",
        alt=words,
        table=Table(list(rows[0]), [list(row.values()) for row in rows]),
        spec=finished(chart, words),
    )


def _error_figure(rows: list[dict[str, Any]]) -> Figure:
    """A line each, before and after."""
    several = len({row["run"] for row in rows}) > 1
    drawn = [row | {"line": f"{row['run']}, {row['when']}" if several else row["when"]} for row in rows]
    in_training = any(row["step"] is not None for row in rows)
    stream = "each model reading what its own earlier layers made" if in_training else "on the teacher's own stream"
    sums = {
        when: [row["error"] for row in rows if row["when"] == when] for when in dict.fromkeys(r["when"] for r in rows)
    }
    words = "Error of the layers' attention " + ", ".join(f"{when} {spread_words(sums[when])}" for when in sums) + "."
    lines = joined(
        base(drawn),
        look("line", list(dict.fromkeys(row["line"] for row in drawn))),
        x=alt.X("layer:Q", title="linearized layer", axis=alt.Axis(tickMinStep=1, format="d")),
        y=alt.Y("error:Q", title="mean squared error", scale=number_scale([row["error"] for row in rows], zero=True)),
        tooltip=["line:N", "layer:Q", "error:Q"],
    )
    return Figure(
        key="lora_errors",
        title="Error by layer, before and after LoRA",
        text=f"Of the output of attention, {stream}.",
        alt=words,
        table=Table(list(rows[0]), [list(row.values()) for row in rows]),
        spec=finished(lines, words),
    )
