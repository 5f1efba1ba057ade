"""Names of runs, which are also those of their folders."""

from __future__ import annotations

import hashlib
import re
from typing import Any

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LONGEST = 40  # characters of a value in a name


def run_name(name: str | None, point: dict[str, Any]) -> str:
    """The name of a run: that of its set of settings, and the values of the axes."""
    last = [key.rpartition(".")[2] for key in point]
    words = [] if name is None else [name]
    for key, short in zip(point, last, strict=True):
        words.append(f"{short if last.count(short) == 1 else key}-{label(point[key])}")
    return "_".join(words) or "run"  # without an axis the file is refused anyway


def label(value: Any) -> str:
    """A value as part of a file's name."""
    if type(value) is int and value >= 10_000 and value % 100 == 0:
        millions = value >= 1_000_000 and value % 10_000 == 0
        return f"{value / 1e6:g}M" if millions else f"{value / 1e3:g}k" if value < 100_000_000 else str(value)
    text = ".".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "-"
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text
