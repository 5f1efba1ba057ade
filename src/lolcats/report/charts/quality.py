"""Perplexity by position, and against the error of the layers."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from lolcats.report.charts.theme import (
    BLUE,
    INK,
    VARIANT_LOOK,
    base,
    choice,
    chosen,
    finished,
    joined,
    look,
    number_scale,
)
from lolcats.report.figure import Figure, Table, spread_words
from lolcats.report.subject import Subject
from lolcats.variants import ordered, short_label

PERPLEXITY, RATIO = "perplexity", "ratio to the teacher's"
"""What perplexity by position can be shown as."""


def position_figure(subjects: Sequence[Subject]) -> Figure | None:
    """Perplexity of every variant by the place of a token in its text, for each text that was measured."""
    rows = [row for subject in subjects for row in _positions(subject, several=len(subjects) > 1)]
    if not rows:
        return None
    texts = sorted(
        dict.fromkeys(row["text"] for row in rows), key=lambda t: -max(r["end"] for r in rows if r["text"] == t)
    )
    names = ordered({row["variant"] for row in rows})
    words = f"Perplexity by position: {spread_words([row['perplexity'] for row in rows])}, for "
    words += f"{', '.join(map(short_label, names))}."
    trained = {subject.name: subject.trained_length for subject in subjects}
    ends = [{"text": text, "at": trained[next(r["run"] for r in rows if r["text"] == text)]} for text in texts]
    drawn = [*_ratios(rows), *(row | {"measure": PERPLEXITY, "value": row["perplexity"]} for row in rows)]
    layers = _by_position(drawn, names, ends).add_params(
        alt.param(name="lines", value=_lines(drawn, names)),
        choice("choose_measure", "show", list(dict.fromkeys(row["measure"] for row in drawn))),
        choice("choose_text", "text", texts),
    )
    columns = ["run", "text", "variant", "start", "end", "perplexity"]
    return Figure(
        key="perplexity_by_position",
        title="Perplexity by position",
        text="The further a token stands in its text, the more there is to remember. Each point is a range of "
        "positions, at its end; the dotted line is the length of the texts of training. The teacher's ratio is 1.",
        alt=words,
        table=Table(columns, [[row[name] for name in columns] for row in rows]),
        spec=finished(layers, words),
    )


def _by_position(rows: list[dict[str, Any]], names: list[str], ends: list[dict[str, Any]]) -> Any:
    """A line a variant, and where the texts of training end."""
    drawn = [row | {"line": short_label(row["variant"])} for row in rows]
    looks = [VARIANT_LOOK.get(name, (INK, "circle", [1, 0])) for name in names]
    lines = joined(
        base(drawn).transform_filter(chosen("text", "measure")),
        look("line", [short_label(name) for name in names], looks, named="lines[choose_measure][choose_text]"),
        x=alt.X("end:Q", title="tokens read, up to", scale=alt.Scale(type="log", base=2, nice=False)),
        y=alt.Y("value:Q", title=None, scale=number_scale([row["value"] for row in rows])),
        tooltip=["line:N", "start:Q", "end:Q", "perplexity:Q"],
    )
    trained = alt.Tooltip("at:Q", title="texts of the training, tokens")
    rule = base(ends).transform_filter(chosen("text")).mark_rule(strokeDash=[2, 4]).encode(x="at:Q", tooltip=[trained])
    return alt.layer(rule, lines)


def _lines(rows: list[dict[str, Any]], names: list[str]) -> dict[str, dict[str, list[str]]]:
    """Measure -> text -> the lines that it has, for the legend of each to name no others."""
    known = {(row["measure"], row["text"], row["variant"]) for row in rows if row["value"] is not None}
    found: dict[str, dict[str, list[str]]] = {}
    for measure, text in dict.fromkeys((row["measure"], row["text"]) for row in rows):
        lines = [short_label(name) for name in names if (measure, text, name) in known]
        found.setdefault(measure, {})[text] = lines
    return found


def _ratios(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every perplexity over the teacher's in the same range of the same text, where that is known."""
    teacher = {(row["text"], row["start"]): row["perplexity"] for row in rows if row["variant"] == "teacher"}
    for row in rows:
        if row["perplexity"] is not None and (base := teacher.get((row["text"], row["start"]))):
            yield row | {"measure": RATIO, "value": row["perplexity"] / base}


def _positions(subject: Subject, several: bool) -> Iterator[dict[str, Any]]:
    """A row a variant and range; `several` runs are told apart in the names of their texts."""
    for scores in subject.scores():
        for variant in ordered(scores.by_position):
            for name, value in scores.by_position[variant].items():
                start, _, end = name.partition("-")
                yield {
                    "run": subject.name, "variant": variant,
                    "text": f"{subject.name}, {scores.text}" if several else scores.text,
                    "start": int(start), "end": int(end), "perplexity": value,
                }  # fmt: skip


def error_figure(subjects: Sequence[Subject]) -> Figure | None:
    """Error of the layers against perplexity, a point a run."""
    rows = []
    for subject in subjects:
        errors = [layer.relative_error for layer in subject.layers if layer.relative_error is not None]
        perplexity, teacher = (subject.results.perplexity.get(name) for name in ("student", "teacher"))
        if errors and perplexity:
            ratio = None if not teacher else perplexity / teacher
            rows.append({
                "run": subject.name, "relative_error": statistics.fmean(errors), "perplexity": perplexity,
                "ratio_to_teacher": ratio,
            })  # fmt: skip
    if len(rows) < 2:
        return None
    words = f"Mean relative error of the layers, {spread_words([row['relative_error'] for row in rows])}, against "
    words += f"perplexity, {spread_words([row['perplexity'] for row in rows])}, of {len(rows)} runs."
    points = (
        base(rows)
        .mark_point(size=80, color=BLUE)
        .encode(
            x=alt.X(
                "relative_error:Q",
                title="error of attention, share of the teacher's output",
                scale=number_scale([row["relative_error"] for row in rows]),
            ),
            y=alt.Y("perplexity:Q", title="perplexity", scale=number_scale([row["perplexity"] for row in rows])),
            tooltip=["run:N", "relative_error:Q", "perplexity:Q"],
        )
    )
    names = points.mark_text(dy=-12, color=INK).encode(text="run:N")
    return Figure(
        key="error_by_perplexity",
        title="Error of the layers against perplexity",
        text="A point a run: whether layers nearer to the teacher's make a model that predicts better.",
        alt=words,
        table=Table(list(rows[0]), [list(row.values()) for row in rows]),
        spec=finished(alt.layer(points, names), words),
    )
