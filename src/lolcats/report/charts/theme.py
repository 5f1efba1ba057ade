"""How charts look, and the parts that several share.

Lines, axes and text take the colour of the page around them (`currentColor`), so that one chart serves light, dark and
print. The palette is that of Okabe and Ito; shape and dash always say the same as colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import altair as alt

from lolcats.files import finite

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
"""The version of the language that Altair writes."""
INK = "currentColor"
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW = "#56B4E9", "#CC79A7", "#F0E442"
PALETTE = [BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, INK, YELLOW]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left", "triangle-right"]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [1, 3], [10, 4], [3, 1]]
PALE = ["#fbfbf3", "#56B4E9"]
"""From no to much, pale enough for black figures on it."""
DIVERGING = ["#D55E00", "#f5f5f5", "#0072B2"]
HEIGHT = 300
LEGEND_WIDTH = 330
"""Pixels of a row of names, on a telephone."""
CHARACTER_WIDTH, SYMBOL_WIDTH = 6.5, 24
"""Pixels of a letter of a name and of the symbol before it with what is around both."""
LOG_RATIO = 4.0
"""Values this far apart are drawn on a logarithmic scale."""

VARIANT_LOOK = {
    "teacher": (INK, "square", [6, 3]),
    "student": (BLUE, "circle", [1, 0]),
    "trained_window": (VERMILLION, "triangle-up", [4, 2]),
    "equal_window": (ORANGE, "triangle-down", [2, 2]),
    "training_free": (PURPLE, "diamond", [8, 3, 2, 3]),
    "transfer": (SKY, "cross", [1, 3]),
    "near_only": (GREEN, "triangle-right", [6, 2]),
    "window_only": (YELLOW, "triangle-left", [3, 1]),
    "linear_only": (PURPLE, "stroke", [1, 1]),
    "no_attention": (INK, "cross", [1, 4]),
}
"""Variant -> colour, shape, dash."""

CONFIG: dict[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": INK, "titleColor": INK, "domainColor": INK, "tickColor": INK, "gridColor": INK,
        "gridOpacity": 0.13, "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal",
        "labelFlush": False,
    },
    "legend": {
        "labelColor": INK, "titleColor": INK, "orient": "bottom", "labelFontSize": 12,
        "symbolSize": 70, "title": None,
    },
    "title": {"color": INK, "subtitleColor": INK, "fontSize": 12, "fontWeight": "normal", "anchor": "start"},
    "text": {"color": INK},
    "rule": {"color": INK},
    "line": {"strokeWidth": 2},
    "point": {"size": 55, "filled": True},
}  # fmt: skip


class _Rows:
    """Rows that are in a specification as they are: Altair would check, copy and convert every number of lists."""

    _schema: ClassVar[dict[str, Any]] = {}
    """What Altair knows things by that convert themselves."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def to_dict(self) -> list[dict[str, Any]]:
        return self.rows


def data_of(rows: Sequence[dict[str, Any]]) -> alt.Data:
    """Rows with five digits of their numbers, of which those that are not finite are missing."""
    data = alt.Data(values=[])
    data["values"] = _Rows(_short(finite(list(rows))))
    return data


def base(rows: Sequence[dict[str, Any]]) -> alt.Chart:
    """A chart of rows."""
    return alt.Chart(data_of(rows))


def measured(chart: alt.Chart) -> alt.Chart:
    """The rows that have the measure which is chosen, as `value`, and as `shown` in as few characters as a cell has."""
    return (
        chart.transform_calculate(value="datum[choose_measure]")
        .transform_filter("isValid(datum.value)")
        .transform_calculate(
            shown="format(datum.value, datum.value != 0 && abs(datum.value) < 0.01 ? '.1~g' : '.2~g')",
        )
    )


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list) else value


def finished(chart: Any, alt_text: str, **size: Any) -> dict[str, Any]:
    """The Vega-Lite specification of a chart; as wide as the page lets it, unless `size` says otherwise."""
    properties: dict[str, Any] = {"description": alt_text, **(size or {"width": "container", "height": HEIGHT})}
    spec = chart.properties(**properties).to_dict(validate=False)  # which takes seconds, and finds our mistakes alone
    spec["config"] = CONFIG
    return spec


def choice(name: str, label: str, options: Sequence[Any], labels: Sequence[str] | None = None) -> Any:
    """A list to choose from under the chart, bound to the parameter `name`; the first option is chosen.

    Where there is only one, there is nothing to choose.
    """
    if len(options) == 1:
        return alt.param(name=name, value=options[0])
    given: dict[str, Any] = {"labels": list(labels)} if labels is not None else {}
    return alt.param(
        name=name,
        value=options[0],
        bind=alt.BindRadioSelect(input="select", options=list(options), name=f"{label} ", **given),
    )


def chosen(*names: str) -> str:
    """The condition that fields have the values that were chosen for them."""
    return " && ".join(f"datum.{name} === choose_{name}" for name in names)


def look(
    field: str, values: Sequence[str], looks: Sequence[tuple[str, str, list[int]]] | None = None, named: str = ""
) -> dict[str, Any]:
    """Colour, shape and dash of a field, each of which tells its values apart.

    Args:
        field: of text.
        values: all that it has.
        looks: colour, shape and dash of each; None is one after the other.
        named: the expression of the values that the legend names, "" for all.
    """
    names = list(values)
    count = len(names)
    # Where the colours begin anew, shapes and dashes are others than the first time.
    told = looks or [
        (PALETTE[n % len(PALETTE)], *(kinds[(n + n // len(PALETTE)) % len(kinds)] for kinds in (SHAPES, DASHES)))
        for n in range(count)
    ]
    colors, shapes, dashes = (list(column) for column in zip(*told, strict=True))
    widest = SYMBOL_WIDTH + CHARACTER_WIDTH * max(map(len, names))
    told_of: dict[str, Any] = {"values": alt.ExprRef(expr=named)} if named else {}
    columns = max(1, min(2, int(LEGEND_WIDTH / widest)))
    legend = alt.Legend(title=None, columns=columns, labelLimit=LEGEND_WIDTH, **told_of)
    return {
        "color": alt.Color(f"{field}:N", scale=alt.Scale(domain=names, range=colors), legend=legend),
        "shape": alt.Shape(f"{field}:N", scale=alt.Scale(domain=names, range=shapes), legend=legend),
        "strokeDash": _dashes(field, dict(zip(names, dashes, strict=True))),
    }


def _dashes(field: str, dashes: dict[str, list[int]]) -> Any:
    """The dash of each value, by conditions: a scale would dash the symbols of the legend, which nobody can tell."""
    found: Any = alt
    for name, dash in dashes.items():
        found = found.when(alt.FieldEqualPredicate(field=field, equal=name)).then(alt.value(dash))
    return found.otherwise(alt.value([1, 0]))


def joined(chart: alt.Chart, looks: dict[str, Any], **encodings: Any) -> Any:
    """Points of a field and the lines that join them."""
    line = chart.mark_line().encode(color=looks["color"], strokeDash=looks["strokeDash"], **encodings)
    points = chart.mark_point().encode(color=looks["color"], shape=looks["shape"], **encodings)
    return alt.layer(line, points)


def number_scale(values: Sequence[float | None], zero: bool = False) -> alt.Scale:
    """Logarithmic where positive values are far apart."""
    known = [value for value in values if value is not None]
    if known and min(known) > 0 and max(known) > LOG_RATIO * min(known):
        return alt.Scale(type="log", nice=False, padding=12)
    return alt.Scale(zero=zero, nice=True)


def share(all_together: int, parts: int, fewest: int, most: int) -> int:
    """How much each of many parts of a chart may have, of what all have together, within limits of its own."""
    return max(fewest, min(most, all_together // max(1, parts)))


def thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the rows, evenly, the last among them."""
    if len(rows) <= most:
        return list(rows)
    step = (len(rows) - 1) / (most - 1)
    return [rows[round(number * step)] for number in range(most)]
