"""By layer and head: error, entropy, shares, decays, sizes."""

from __future__ import annotations

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

LAYER_MEASURES = {
    "relative_error": "error, share of the teacher's output",
    "error": "error, mean square",
    "entropy": "entropy of the teacher's attention, nats",
}
NOW = "student"
EARLIER = {"error_before": "nothing trained", "error_transfer": "after stage 1"}
"""Errors of a layer from before it was what it is."""
HEAD_MEASURES = {
    "relative_error": "error, share of the teacher's output",
    "error": "error, mean square",
    "entropy": "entropy of the teacher's attention, nats",
    "far_share_teacher": "far share, teacher",
    "far_share_student": "far share, student",
    "kept_share": "share of kept pairs",
    "share": "share of the far half",
    "decay": "decay",
    "window_factor": "window factor",
    "window": "window, tokens",
    "pairs": "kept pairs",
}
"""What a head says of itself -> what people call it."""
STAGES = {"transfer": "stage 1", "finetune": "stage 2"}
FEWEST_VALIDATIONS, MOST_VALIDATIONS = 4, 24
"""Of a run, whose layers are on the page."""
ALL_VALIDATIONS = 96
"""Of all runs, in one list to choose from."""
MOST_FIGURES = 16
"""Heads up to which there is room for a figure in each cell."""


def layer_figures(subjects: Sequence[Subject]) -> Iterator[Figure]:
    """All of what is known by layer and head."""
    layers = [row for subject in subjects for row in _layer_rows(subject)]
    if layers:
        yield _layer_figure(layers)
    most = share(ALL_VALIDATIONS, len(subjects), FEWEST_VALIDATIONS, MOST_VALIDATIONS)
    validated = [row for subject in subjects for row in _validated(subject, most)]
    if validated:
        yield _validation_figure(validated)
    heads = [row for subject in subjects for row in _head_rows(subject)]
    if heads:
        yield _head_map(heads)
        yield from _scatters(heads)


def _layer_rows(subject: Subject) -> Iterator[dict[str, Any]]:
    """A row a layer, with its error before anything was trained and after stage 1 where these are known."""
    for layer in subject.layers:
        names = [*LAYER_MEASURES, *EARLIER]
        yield {"run": subject.name, "layer": layer.layer, "linearized": layer.linearized} | {
            name: getattr(layer, name) for name in names
        }


def _head_rows(subject: Subject) -> Iterator[dict[str, Any]]:
    for layer in subject.layers:
        for head in layer.heads:
            row = {"run": subject.name, "layer": layer.layer, "head": head.head, "key_head": head.key_head}
            yield row | {name: getattr(head, name) for name in HEAD_MEASURES} | {"sinks": head.sinks}


def _layer_figure(rows: list[dict[str, Any]]) -> Figure:
    """A line a run; its errors with nothing trained and after stage 1 beside it, of several runs to be chosen."""
    drawn = [_point(row, name, row[name], NOW) for row in rows for name in LAYER_MEASURES if row[name] is not None]
    drawn += [point for row in rows for name, label in EARLIER.items() for point in _earlier(row, name, label)]
    several = len({row["run"] for row in rows}) > 1
    for point in drawn:
        run, kind = point.pop("run"), point.pop("kind")
        point["line"] = run if several else kind
        if several and kind != NOW:
            point["measure"] += f", {kind}"
    known = sorted((r for r in rows if r["relative_error"] is not None), key=lambda r: -r["relative_error"])
    worst = list(dict.fromkeys(row["layer"] for row in known))[:3]
    words = f"Error by layer, as a share of the teacher's output: {spread_words([r['relative_error'] for r in rows])}; "
    words += f"the worst are layers {', '.join(map(str, worst))}."
    labels = list(dict.fromkeys(point["measure"] for point in drawn))
    layers = joined(
        base(drawn).transform_filter(chosen("measure")),
        look("line", list(dict.fromkeys(point["line"] for point in drawn))),
        x=alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1, format="d")),
        y=alt.Y("value:Q", title=None, scale=number_scale([point["value"] for point in drawn], zero=True)),
        tooltip=["line:N", "measure:N", "layer:Q", "value:Q"],
    ).add_params(choice("choose_measure", "show", labels))
    return Figure(
        key="layers",
        title="Error by layer",
        text="How far the output of attention is from the teacher's on the teacher's own stream. High is bad.",
        alt=words,
        table=Table(list(rows[0]), [list(row.values()) for row in rows]),
        spec=finished(layers, words),
    )


def _earlier(row: dict[str, Any], name: str, label: str) -> Iterator[dict[str, Any]]:
    """An earlier error, by itself and as a share: the teacher's output is the same that the student's error is of."""
    if row[name] is not None:
        yield _point(row, "error", row[name], label)
        if row["error"] and row["relative_error"] is not None:
            yield _point(row, "relative_error", row[name] * row["relative_error"] / row["error"], label)


def _point(row: dict[str, Any], measure: str, value: float, kind: str) -> dict[str, Any]:
    return {
        "run": row["run"], "layer": row["layer"], "measure": LAYER_MEASURES[measure], "value": value, "kind": kind,
    }  # fmt: skip


def _head_map(rows: list[dict[str, Any]]) -> Figure:
    """Layers x heads of one run, coloured by what is chosen."""
    runs = list(dict.fromkeys(row["run"] for row in rows))
    measures = [name for name in HEAD_MEASURES if any(row[name] is not None for row in rows)]
    drawn = [{name: row[name] for name in ("run", "layer", "head", *measures)} for row in rows]
    words = f"Map of {len(rows)} heads; relative error {spread_words([row['relative_error'] for row in rows])}."
    chart = measured(base(drawn).transform_filter(chosen("run")))
    where: dict[str, Any] = {
        "x": alt.X("head:O", title="head", axis=alt.Axis(labelAngle=0)),
        "y": alt.Y("layer:O", title="layer"),
    }
    color = alt.Color("value:Q", scale=alt.Scale(range=PALE, zero=True), legend=alt.Legend(title=None))
    boxes = chart.mark_rect(stroke="#999", strokeWidth=0.4).encode(
        color=color, tooltip=["layer:O", "head:O", "value:Q"], **where
    )
    parts: list[Any] = [boxes]
    if len({row["head"] for row in rows}) <= MOST_FIGURES:
        parts.append(chart.mark_text(color="#000", fontSize=9).encode(text="shown:N", **where))
    layers = alt.layer(*parts).add_params(
        choice("choose_measure", "show", measures, [HEAD_MEASURES[name] for name in measures]),
        choice("choose_run", "of", runs),
    )
    return Figure(
        key="heads",
        title="Every head",
        text="A row a layer, a column a query head. The far share is the weight on what is neither window nor sinks.",
        alt=words,
        table=Table(list(rows[0]), [list(row.values()) for row in rows]),
        spec=finished(layers, words, width="container", height=max(160, 17 * len({row["layer"] for row in rows}))),
    )


def _scatters(rows: list[dict[str, Any]]) -> Iterator[Figure]:
    """Error against entropy, and the far shares of student and teacher, a point a head."""
    kinds = [
        ("error_by_entropy", "Error against entropy", "entropy", "relative_error",
         "A point a head: whether what looks at much at once (high entropy) is harder to replace."),
        ("far_share", "Far share of teacher and student", "far_share_teacher", "far_share_student",
         "A point a head. On the diagonal, the student looks as much beyond window and sinks as the teacher."),
    ]  # fmt: skip
    for key, title, x, y, text in kinds:
        known = [row for row in rows if row[x] is not None and row[y] is not None]
        if known:
            yield _scatter(known, key, title, (x, y), text)


def _scatter(rows: list[dict[str, Any]], key: str, title: str, names: tuple[str, str], text: str) -> Figure:
    x, y = names
    values = {name: [row[name] for row in rows] for name in names}
    words = f"{title}: {HEAD_MEASURES[x]} {spread_words(values[x])}, {HEAD_MEASURES[y]} {spread_words(values[y])}, of "
    words += f"{len(rows)} heads."
    columns = ["run", "layer", "head", x, y]
    drawn = [{name: row[name] for name in columns} for row in rows]
    looks, shares = look("run", list(dict.fromkeys(row["run"] for row in rows))), key == "far_share"
    whole = alt.Scale(domain=[0, 1])
    points = base(drawn).mark_point(opacity=0.75).encode(
        x=alt.X(f"{x}:Q", title=HEAD_MEASURES[x], scale=whole if shares else alt.Scale()),
        y=alt.Y(f"{y}:Q", title=HEAD_MEASURES[y], scale=whole if shares else number_scale(values[y], zero=True)),
        color=looks["color"], shape=looks["shape"],
        tooltip=[f"{name}:{'N' if name == 'run' else 'Q'}" for name in columns],
    )  # fmt: skip
    parts: list[Any] = [points]
    if shares:
        ends = [{"x": 0, "y": 0}, {"x": 1, "y": 1}]
        parts.insert(
            0, base(ends).mark_line(strokeDash=[2, 4], strokeWidth=1, color="currentColor").encode(x="x:Q", y="y:Q")
        )
    return Figure(
        key=key,
        title=title,
        text=text,
        alt=words,
        table=Table(columns, [[row[name] for name in columns] for row in rows]),
        spec=finished(alt.layer(*parts), words),
    )


def _validated(subject: Subject, most: int) -> Iterator[dict[str, Any]]:
    """Losses of layers that validations gave, a row a layer and step."""
    lines = [line for line in subject.metrics if isinstance(line.get("validation_layers"), list)]
    for line in thinned(lines, most):
        for layer, value in enumerate(line["validation_layers"]):
            yield {
                "run": subject.name,
                "stage": line.get("stage"),
                "step": line["step"],
                "layer": layer,
                "error": value,
            }


def _moment(row: dict[str, Any], several: bool) -> str:
    """A validation for people; every run has its own steps."""
    when = f"{STAGES.get(row['stage'], row['stage'])}, step {row['step']:,}"
    return f"{row['run']}, {when}" if several else when


def _validation_figure(rows: list[dict[str, Any]]) -> Figure:
    """Error by layer at each validation of training."""
    several = len({row["run"] for row in rows}) > 1
    drawn = [row | {"at": _moment(row, several)} for row in rows]
    last = [row["error"] for row in rows if (row["stage"], row["step"]) == (rows[-1]["stage"], rows[-1]["step"])]
    words = f"Error by linearized layer at validations; {spread_words(last)} at the last."
    chart = base(drawn).transform_filter(chosen("at"))
    bars = chart.mark_bar(color="#56B4E9").encode(
        x=alt.X("layer:O", title="linearized layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
        y=alt.Y("error:Q", title="mean squared error"),
        tooltip=["layer:O", "error:Q"],
    )
    bars = bars.add_params(choice("choose_at", "at", list(dict.fromkeys(row["at"] for row in reversed(drawn)))))
    return Figure(
        key="layers_in_training",
        title="Error by layer in training",
        text="Of the output of attention on text that was held out, as the stages themselves validate it: not as a "
        "share of that output, so layers with large outputs stand out.",
        alt=words,
        table=Table(list(rows[0]), [list(row.values()) for row in rows]),
        spec=finished(bars, words),
    )
