"""The essentials of an analysis as people read them in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table

from lolcats.cli.tables import number_table

if TYPE_CHECKING:
    from lolcats.evaluation.analysis import Analysis
    from lolcats.evaluation.analysis.file import HeadAnalysis, LayerAnalysis

WORST = 5
"""Layers that are shown."""


def layers_table(layers: list[LayerAnalysis]) -> Table:
    """The layers whose output is farthest from the teacher's, the worst first."""
    headers = ["relative error", "error", "untrained", "entropy", "far, teacher", "far, student", "worst head"]
    table = number_table(["layer"], headers)
    known = [layer for layer in layers if layer.relative_error is not None]
    for layer in sorted(known, key=lambda layer: -(layer.relative_error or 0.0))[:WORST]:
        worst = max(layer.heads, key=lambda head: head.relative_error or 0.0, default=None)
        table.add_row(
            str(layer.layer),
            _share(layer.relative_error),
            _number(layer.error),
            _number(layer.error_before),
            "-" if layer.entropy is None else f"{layer.entropy:.2f}",
            _share(_over(layer.heads, "far_share_teacher")),
            _share(_over(layer.heads, "far_share_student")),
            "-" if worst is None else f"{worst.head} ({_share(worst.relative_error)})",
        )
    return table


def share_line(layers: list[LayerAnalysis]) -> str:
    """Where teacher and student look, mean over all heads."""
    heads = [head for layer in layers for head in layer.heads]
    names = {"far_share_teacher": "teacher", "far_share_student": "student"}
    shares = [f"{label} {_share(_over(heads, key))}" for key, label in names.items()]
    parts = {"kept_share": "kept pairs", "share": "far half"}
    of_student = [f"{label} {_share(part)}" for key, label in parts.items() if (part := _over(heads, key)) is not None]
    text = f"attention beyond window and sinks, mean over heads: {', '.join(shares)}"
    return f"{text} ({', '.join(of_student)})" if of_student else text


def kept_line(analysis: Analysis) -> str:
    """How good the choice of kept pairs is; "" where none are kept."""
    kept = [row for row in analysis.kept or [] if row.positions]
    if not kept:
        return ""
    chance = _share(_mean(len(row.positions) / row.candidates for row in kept))
    oracle, recency = (_share(_mean(getattr(row, f"overlap_{name}") for row in kept)) for name in ("oracle", "recency"))
    text = f"kept pairs: {oracle} of those that later attention would choose ({chance} by chance)"
    text += f", {recency} of the latest"
    stay = _mean(row.stay_mean for row in kept)
    return text if stay is None else f"{text}; a pair stays {stay:,.0f} tokens"


def _over(heads: list[HeadAnalysis], key: str) -> float | None:
    return _mean(getattr(head, key) for head in heads)


def _mean(numbers: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known else None


def _share(number: float | None) -> str:
    return "-" if number is None else f"{number:.1%}"


def _number(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"
