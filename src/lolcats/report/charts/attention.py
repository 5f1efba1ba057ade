"""Weights of attention: teacher, student and difference of one head, layer and text to choose.

A page holds the maps of hundreds of heads, so a map is a string with a character a cell of its lower triangle, and the
chart unpacks the one that is chosen. A character is one of `LEVELS` steps, finer where weights are small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from lolcats.report.charts.theme import DIVERGING, choice, chosen, data_of, finished
from lolcats.report.figure import Figure, Table

ALPHABET = "".join(chr(code) for code in range(33, 127) if chr(code) not in "\"&'<>\\")
"""What JSON in a page spells with one character each."""
LEVELS = len(ALPHABET)
MOST_CHARACTERS = 1_500_000
"""Of all maps together on the page; larger ones are pooled."""
MOST_CELLS = 96
"""Of a side of a map on the page."""
SIDE = 300
"""Pixels of a map."""


@dataclass
class TextMaps:
    """The maps of one text of one run."""

    label: str
    tokens: list[str]
    """The text of each cell."""
    layers: list[int]
    heads: list[int]
    teacher: np.ndarray
    """[layers, heads, n, n] float32: weight of a cell of keys in the mean query of a cell; rows add up to 1."""
    student: np.ndarray

    @property
    def maps(self) -> int:
        """How many there are of the teacher."""
        return len(self.layers) * len(self.heads)


def attention_figure(texts: Sequence[TextMaps], first: tuple[int | None, int | None] = (None, None)) -> Figure | None:
    """The maps of all texts, one of which is shown.

    Args:
        texts: of any runs.
        first: layer and head that are shown at first.
    """
    if not texts:
        return None
    texts = _fitting(texts)
    rows = [row for text in texts for row in _rows(text)]
    layers, heads = (sorted({row[name] for row in rows}) for name in ("layer", "head"))
    layers.sort(key=lambda layer: layer != first[0])
    heads.sort(key=lambda head: head != first[1])
    words = f"Maps of attention of {len(layers)} layers and {len(heads)} heads over "
    words += f"{', '.join(text.label for text in texts)}: what each query (row) "
    words += "looks at (column), for teacher, student and their difference."
    tokens = {text.label: text.tokens for text in texts}
    chart = alt.concat(*_views(), columns=3, spacing=18, data=data_of(rows))
    chart = _unpacked(chart).resolve_scale(color="independent").add_params(
        alt.param(name="tokens", value=tokens),
        choice("choose_layer", "layer", layers),
        choice("choose_head", "head", heads),
        choice("choose_text", "text", list(tokens)),
    )  # fmt: skip
    return Figure(
        key="attention",
        title="What a head looks at",
        text="Rows are queries, columns keys, the start of the text is at the top left. Weights are shown in "
        f"{LEVELS} steps; a cell of a long text is several tokens, whose weights are added up.",
        alt=words,
        table=_table(texts),
        spec=finished(chart, words, center=False) | {"autosize": {"type": "pad", "resize": True}},
        cells=SIDE + 60,
    )


def _rows(text: TextMaps) -> Iterator[dict[str, Any]]:
    """A row for both maps of a head."""
    for i, layer in enumerate(text.layers):
        for j, head in enumerate(text.heads):
            maps = {"t": encode(text.teacher[i, j]), "s": encode(text.student[i, j])}
            yield {"text": text.label, "layer": layer, "head": head, **maps}


def encode(weights: np.ndarray) -> str:
    """The lower triangle [n, n] of a map, row by row."""
    rows, columns = np.tril_indices(weights.shape[0])
    levels = np.rint(np.sqrt(np.clip(weights[rows, columns], 0.0, 1.0)) * (LEVELS - 1)).astype(np.uint8)
    return np.frombuffer(ALPHABET.encode(), np.uint8)[levels].tobytes().decode()


def pooled(weights: np.ndarray, cell: int) -> np.ndarray:
    """Maps [..., n, n] with cells of `cell` tokens: keys added up, queries averaged."""
    n = weights.shape[-1]
    edges = np.arange(0, n, cell)
    counts = np.diff([*edges, n])
    keys = np.add.reduceat(weights, edges, axis=-1)
    return np.add.reduceat(keys, edges, axis=-2) / counts[:, None]


def _fitting(texts: Sequence[TextMaps]) -> list[TextMaps]:
    """The texts, pooled until all have room on a page."""
    share = MOST_CHARACTERS / sum(text.maps for text in texts) / 2  # cells of a triangle
    most = min(MOST_CELLS, max(8, int(math.sqrt(2 * share)) - 1))
    found = []
    for text in texts:
        cell = -(-text.teacher.shape[-1] // most)
        tokens = ["".join(text.tokens[i : i + cell]) for i in range(0, len(text.tokens), cell)]
        maps = [pooled(weights.astype(np.float32), cell) for weights in (text.teacher, text.student)]
        found.append(TextMaps(text.label, tokens, text.layers, text.heads, *maps))
    return found


def _unpacked(chart: Any) -> Any:
    """The cells of the map that is chosen, a row each: query, key, both weights."""
    return (
        chart.transform_filter(chosen("layer", "head", "text"))
        .transform_calculate(t="split(datum.t, '')", s="split(datum.s, '')")
        .transform_flatten(["t", "s"])
        .transform_window(number="row_number()")
        .transform_calculate(query="floor((sqrt(8 * datum.number - 7) - 1) / 2)")
        .transform_calculate(
            key="datum.number - 1 - datum.query * (datum.query + 1) / 2",
            teacher=_weight("t"),
            student=_weight("s"),
        )
        .transform_calculate(
            difference="datum.student - datum.teacher",
            query_token="tokens[datum.text][datum.query]",
            key_token="tokens[datum.text][datum.key]",
        )
    )


def _weight(name: str) -> str:
    """The expression that undoes `encode` of one character."""
    return f"pow(indexof('{ALPHABET}', datum.{name}) / {LEVELS - 1}, 2)"


def _views() -> list[alt.Chart]:
    """Teacher, student, difference."""
    blank = alt.Axis(labels=False, ticks=False, domain=False)
    plain = alt.Scale(type="sqrt", domain=[0, 1], scheme="viridis")
    split = alt.Scale(type="pow", exponent=0.5, domain=[-0.5, 0.5], domainMid=0, clamp=True, range=DIVERGING)
    return [
        alt.Chart()
        .mark_rect()
        .encode(
            x=alt.X("key:O", title="key", axis=blank),
            y=alt.Y("query:O", title="query", axis=blank),
            color=alt.Color(
                f"{name}:Q", scale=scale, legend=alt.Legend(gradientLength=SIDE - 60, values=values, format=".1f")
            ),
            tooltip=["query:Q", "query_token:N", "key:Q", "key_token:N", "teacher:Q", "student:Q", "difference:Q"],
        )
        .properties(width=SIDE, height=SIDE, title=title)
        for name, title, scale, values in (
            ("teacher", "teacher", plain, [0, 0.1, 0.5, 1]),
            ("student", "student", plain, [0, 0.1, 0.5, 1]),
            ("difference", "student minus teacher", split, [-0.5, -0.1, 0, 0.1, 0.5]),
        )
    ]


def _table(texts: Sequence[TextMaps]) -> Table:
    """How far apart both maps of each head are: a table of all weights would be of no use."""
    columns = ["text", "layer", "head", "half of the difference's sum, mean over queries"]
    rows = []
    for text in texts:
        apart = np.abs(text.student - text.teacher).sum(-1).mean(-1) / 2
        rows += [
            [text.label, layer, head, float(apart[i, j])]
            for i, layer in enumerate(text.layers)
            for j, head in enumerate(text.heads)
        ]
    return Table(columns, rows)
