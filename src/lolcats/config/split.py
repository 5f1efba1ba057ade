"""The setting `linearization.split`: how layers and key heads share a budget of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator

MOST = 2**17
"""Tokens of a window, and kept pairs."""
SHAPE = "[window, pairs] for all key heads of a layer, or a list of [window, pairs], one for each key head"


def _check(value: list[Any]) -> list[Any]:
    if not value:
        raise ValueError("expected an entry for each linearized layer, got none; null lets all layers be alike")
    for number, entry in enumerate(value):
        sizes = [entry] if _is_pair(entry) else entry
        if not isinstance(sizes, list) or not sizes or not all(map(_is_pair, sizes)):
            raise ValueError(f"entry {number}: expected {SHAPE}; got {str(entry)[:60]}")
        for window, pairs in sizes:
            if not 1 <= window <= MOST or not 0 <= pairs <= MOST:
                raise ValueError(f"entry {number}: expected a window of 1 to {MOST} and 0 to {MOST} pairs; got "
                                 f"[{window}, {pairs}]")  # fmt: skip
    return value


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)


LayerSplit = Annotated[list[Any], AfterValidator(_check)]
"""An entry for each linearized layer, in order: see `SHAPE`."""


def sizes_by_layer(split: list[Any]) -> list[list[list[int]]]:
    """Of each layer [window, pairs] of each key head, or one for all of them."""
    return [[entry] if _is_pair(entry) else entry for entry in split]


def all_sizes(split: list[Any]) -> Iterator[list[int]]:
    """[window, pairs] of all layers and heads."""
    for sizes in sizes_by_layer(split):
        yield from sizes


def spread(values: list[int]) -> str:
    """Numbers as people read them: "64", or "16 to 384"."""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"
