"""Memory: of one text by its length, and what perplexity and recall it buys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import altair as alt

from lolcats.errors import LolcatsError
from lolcats.report.charts.theme import HEIGHT, INK, base, choice, chosen, finished, joined, look, number_scale
from lolcats.report.figure import Figure, Table, spread_words
from lolcats.report.subject import Subject
from lolcats.sweep.points import TEACHER, Point, read_points


def points_of(subjects: Sequence[Subject]) -> tuple[list[Point], str]:
    """The points of all subjects with their recall, and why there are none or not all."""
    sources: list[Any] = []
    for subject in subjects:
        if subject.results.memory is not None and "student" in subject.results.perplexity:
            sources += [subject.place]
    if not sources:
        return [], "No run here has both its memory and its perplexity yet."
    try:
        points = read_points(sources)
    except LolcatsError as error:
        return [], f"Not drawn: {error}"
    cells = {str(subject.place): subject.cells() for subject in subjects}
    for point in points:
        for (variant, task, length), cell in cells.get(point.source, {}).items():
            if variant == point.variant:
                point.recall.setdefault(f"{task}.{length}", cell.score)
    return points, ""


def memory_figures(subjects: Sequence[Subject], points: Sequence[Point]) -> Iterator[Figure]:
    """Perplexity and recall of all runs and of their windows against the memory of a text."""
    names = {str(subject.place): subject.name for subject in subjects}
    known = [(point, _point_row(point, names)) for point in points]
    perplexity = [
        row | {"perplexity": p.perplexity, "value": p.perplexity} for p, row in known if p.perplexity is not None
    ]
    if perplexity:
        text = "Lower and further left is better."
        yield _memory_figure("perplexity_by_memory", "Perplexity against memory", "perplexity", perplexity, text)
    recall = [
        row | {"task": task, "length": int(length), "share": share, "value": 100 * share}
        for point, row in known
        for cell, share in point.recall.items()
        for task, _, length in [cell.rpartition(".")]
    ]
    if recall:
        text = "Higher and further left is better."
        yield _memory_figure("recall_by_memory", "Recall against memory", "found, %", recall, text)


def _point_row(point: Point, names: dict[str, str]) -> dict[str, Any]:
    return {
        "run": names.get(point.source, point.source), "line": point.line, "variant": point.variant,
        "kv_tokens": point.kv_tokens,
    }  # fmt: skip


def _memory_figure(key: str, title: str, axis: str, rows: list[dict[str, Any]], text: str) -> Figure:
    """Students and windows as points of a line a kind; the teacher, whose memory grows, as a level."""
    columns = [name for name in rows[0] if name != "value"]
    drawn: list[dict[str, Any]] = [
        row | {"asked": f"{row['task']}, {row['length']:,} tokens" if "task" in row else axis} for row in rows
    ]
    longest = sorted(drawn, key=lambda row: -row.get("length", 0))
    labels = list(dict.fromkeys(row["asked"] for row in longest))
    values: list[float] = [row["value"] for row in rows]
    tokens = [row["kv_tokens"] for row in rows]
    words = f"{title}: {axis} {spread_words(values)}, at {spread_words(tokens)} KV tokens of the teacher."
    layers = _against_memory(drawn, axis, alt.Scale(domain=[0, 100]) if "share" in columns else number_scale(values))
    return Figure(
        key=key,
        title=title,
        text=f"{text} The dashed level is the teacher, whose memory grows with the text.",
        alt=words,
        table=Table(columns, [[row[name] for name in columns] for row in rows]),
        spec=finished(layers.add_params(choice("choose_asked", "asked", labels)), words),
    )


def _against_memory(rows: list[dict[str, Any]], axis: str, scale: alt.Scale) -> Any:
    students, teachers = ([row for row in rows if (row["line"] == TEACHER) == flag] for flag in (False, True))
    points = joined(
        base(students).transform_filter(chosen("asked")),
        look("line", list(dict.fromkeys(row["line"] for row in students))),
        x=alt.X("kv_tokens:Q", title="memory of a text, in KV tokens of the teacher",
                scale=alt.Scale(zero=False, padding=20)),
        y=alt.Y("value:Q", title=axis, scale=scale),
        tooltip=["run:N", "line:N", "kv_tokens:Q", alt.Tooltip("value:Q", title=axis)],
    )  # fmt: skip
    level = base(teachers).transform_filter(chosen("asked")).mark_rule(strokeDash=[6, 3], color=INK)
    return alt.layer(points, level.encode(y="value:Q", tooltip=[alt.Tooltip("value:Q", title="teacher")]))


def cache_figure(subjects: Sequence[Subject]) -> Figure | None:
    """Bytes of one text by its length: the teacher's cache and what each student holds."""
    rows = [
        {"run": subject.name, "line": line, "tokens": tokens, "bytes": held}
        for subject in subjects
        if subject.sizes is not None
        for tokens, teacher, own in subject.sizes.memory()
        for line, held in (("teacher's cache", teacher), (subject.name, own))
    ]
    if not rows:
        return None
    lines = list(dict.fromkeys(row["line"] for row in rows))
    drawn = [row | {"mebibytes": row["bytes"] / 2**20} for row in rows]
    words = f"Memory of one text from {spread_words([row['tokens'] for row in rows])} tokens: "
    words += (
        "; ".join(f"{n} {spread_words([r['mebibytes'] for r in drawn if r['line'] == n])} MiB" for n in lines) + "."
    )
    layers = joined(
        base(drawn),
        look("line", lines),
        x=alt.X("tokens:Q", title="tokens of the text", scale=alt.Scale(type="log", base=2, nice=False)),
        y=alt.Y("mebibytes:Q", title="MiB", scale=alt.Scale(type="log", nice=False, padding=12)),
        tooltip=["line:N", "tokens:Q", "bytes:Q"],
    )
    return Figure(
        key="memory_by_length",
        title="Memory of one text",
        text="Bytes that a text takes in the cache, all layers together, counted from the configuration.",
        alt=words,
        table=Table(list(rows[0]), [list(row.values()) for row in rows]),
        spec=finished(layers, words, width="container", height=HEIGHT - 60),
    )
