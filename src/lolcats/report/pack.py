"""Rows of numbers in few characters: the page keeps the data of its charts by column, and page.js makes rows of it.

A row of Vega-Lite spells the names of its fields, which take more room than what is in them; and most columns say the
same again and again. Nothing is lost: rows come out as they went in.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

PACKED = "packed"
"""The field of Vega-Lite's `data` that holds columns instead of `values`."""


def packed(spec: Any) -> Any:
    """A chart with the rows of its data by column, wherever all of them have the same fields."""
    if isinstance(spec, list):
        return [packed(part) for part in spec]
    if not isinstance(spec, dict):
        return spec
    return {key: _data(value) if key == "data" else packed(value) for key, value in spec.items()}


def _data(data: Any) -> Any:
    rows = data.get("values") if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows or any(row.keys() != rows[0].keys() for row in rows):
        return data
    rest = {key: value for key, value in data.items() if key != "values"}
    return rest | {PACKED: {name: _column([row[name] for row in rows]) for name in rows[0]}}


def _column(values: list[Any]) -> Any:
    """The shortest of: the values; different ones and how often each stands in a row; different ones and which."""
    texts = [_text(value) for value in values]
    kinds = list(dict.fromkeys(texts))
    runs = [(text, len(list(same))) for text, same in groupby(texts)]
    number = {text: n for n, text in enumerate(kinds)}
    known = dict(zip(texts, values, strict=True))
    ways: Sequence[Any] = (
        values,
        {"of": [known[text] for text, _ in runs], "times": [count for _, count in runs]},
        {"of": [known[text] for text in kinds], "at": [number[text] for text in texts]},
    )
    return min(ways, key=lambda way: len(_text(way)))


_text = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
