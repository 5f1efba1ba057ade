"""Sharing bytes among layers or key heads, so that the sum of their costs is least.

Each taker may have one of several sizes (window, kept pairs), which take bytes and cost something. On the lower convex
hull of its (bytes, cost) a step to the next size never brings more for a byte than the step before; so the best steps
of all takers, one after the other until the bytes are spent, are the least cost but for the last step, which is taken
in part (sizes between two measured ones).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Size = tuple[int, int]
"""(window, kept pairs)."""


class Taker(NamedTuple):
    """A layer, or a key head."""

    costs: Mapping[Size, float]
    """Size -> what it costs."""
    bytes_of: Callable[[Size], int]


def spread_bytes(takers: Sequence[Taker], total: int) -> list[Size]:
    """The size of each taker; together they take no more than `total` bytes.

    Raises:
        ValueError: all takers at their smallest sizes take more.
    """
    hulls = [_hull(taker) for taker in takers]
    sizes = [hull[0].size for hull in hulls]
    left = total - sum(taker.bytes_of(size) for taker, size in zip(takers, sizes, strict=True))
    if left < 0:
        raise ValueError(f"expected {total - left} bytes or more, got {total}")
    steps = [_step(hull, number, 0) for number, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, number, place = heapq.heappop(steps)
        taker, new = takers[number], hulls[number][place + 1].size
        more = taker.bytes_of(new) - taker.bytes_of(sizes[number])
        if more > left:
            new = _between(taker, sizes[number], new, left)
            left -= taker.bytes_of(new) - taker.bytes_of(sizes[number])
            sizes[number] = new
            break
        sizes[number], left = new, left - more
        if place + 2 < len(hulls[number]):
            heapq.heappush(steps, _step(hulls[number], number, place + 1))
    return _give_rest(takers, sizes, left)


class _Point(NamedTuple):
    bytes: int
    cost: float
    size: Size


def _hull(taker: Taker) -> list[_Point]:
    """The sizes on the lower convex hull, from the fewest bytes on; none that costs as much as a smaller one."""
    hull: list[_Point] = []
    for point in sorted(_Point(taker.bytes_of(size), cost, size) for size, cost in taker.costs.items()):
        if hull and point.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _gain(small: _Point, large: _Point) -> float:
    """What a byte brings between two sizes."""
    return (small.cost - large.cost) / (large.bytes - small.bytes)


def _step(hull: list[_Point], number: int, place: int) -> tuple[float, int, int]:
    return -_gain(hull[place], hull[place + 1]), number, place


def _between(taker: Taker, small: Size, large: Size, left: int) -> Size:
    """The largest size on the way from one to another that takes no more than `left` bytes beyond the first."""
    limit, parts = taker.bytes_of(small) + left, 1 << 12
    best = small
    for part in range(1, parts):
        window, pairs = (a + (b - a) * part // parts for a, b in zip(small, large, strict=True))
        if (window, pairs) != best and window >= 1 and taker.bytes_of((window, pairs)) <= limit:
            best = (window, pairs)
    return best


def _give_rest(takers: Sequence[Taker], sizes: Sequence[Size], left: int) -> list[Size]:
    """Windows made longer by what is left: of all alike, then by a token one after the other."""
    tokens = [taker.bytes_of((w + 1, p)) - taker.bytes_of((w, p)) for taker, (w, p) in zip(takers, sizes, strict=True)]
    each = left // sum(tokens)
    left -= each * sum(tokens)
    given = []
    for (window, pairs), token in zip(sizes, tokens, strict=True):
        more = int(token <= left)
        left -= more * token
        given.append((window + each + more, pairs))
    return given
