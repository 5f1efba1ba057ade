"""The lines that a run writes while it trains: metrics.jsonl, and others like it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file with a step each, none where there is none; a killed run may leave half a line."""
    found: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            found.append(content)
    return found
