"""The metrics of all blocks as those of the whole stage."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolcats.files import write_text
from lolcats.runs.metrics import read_lines

Key = tuple[int, bool]
"""A step, and whether it is its validation."""
SAME = ("stage", "step", "tokens", "lr", "recall_gap")


def merge_metrics(blocks: Sequence[tuple[int, Path]], target: Path) -> None:
    """Write the steps that all blocks have behind what is in `target` of other stages.

    Args:
        blocks: linearized layers of each, and its metrics.
        target: metrics.jsonl of the run.
    """
    lines = [{_key(line): line for line in read_lines(path)} for _, path in blocks]
    common = [key for key in lines[0] if all(key in own for own in lines)]
    counts = [layers for layers, _ in blocks]
    merged = [_merge(counts, [own[key] for own in lines]) for key in common]
    others = [line for line in read_lines(target) if line.get("stage") != "transfer"]
    write_text(target, "".join(json.dumps(line) + "\n" for line in [*merged, *others]))


def _key(line: dict[str, Any]) -> Key:
    return line["step"], "lr" not in line


def _merge(counts: Sequence[int], lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over layers; lists one after the other; the norm of all gradients together; time adds up."""
    merged: dict[str, Any] = {}
    for name, first in lines[0].items():
        values = [line[name] for line in lines if name in line]
        if name in SAME or len(values) < len(lines):
            merged[name] = first
        elif isinstance(first, list):
            merged[name] = [value for part in values for value in part]
        elif name == "gradient_norm":
            merged[name] = math.hypot(*values)
        elif name == "tokens_per_second":
            merged[name] = 1 / sum(1 / value for value in values)
        else:
            merged[name] = sum(map(math.prod, zip(counts, values, strict=True))) / sum(counts)
    return merged
