"""What is known of a finished run: named measurements, each of which gives columns of the table.

A measurement that has to run the model is made once and kept in RUN/measurements/NAME.json. To add one, put it into
`MEASUREMENTS`, or pass a list of your own to `run_sweep`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.files import write_text
from lolcats.runs.folder import RunFolder

Columns = dict[str, float | None]
"""Name of a column, such as perplexity.student -> value; None where there is no finite number."""


@dataclass(frozen=True)
class SweepMeasurement:
    """Something to know of every run.

    Args:
        name: also of the file in which the columns are kept.
        measure: makes the columns of a finished run.
        kept: whether they are written to a file, and read from it the next time.
    """

    name: str
    measure: Callable[[RunConfig, RunFolder], Columns]
    kept: bool = True


def run_results(config: RunConfig, folder: RunFolder) -> Columns:
    """The columns of results.json: perplexity, KL, tokens/s, seconds, and the memory of a text."""
    results = folder.results()
    columns: Columns = {}
    for section in ("perplexity", "kl", "tokens_per_second", "seconds"):
        columns |= {f"{section}.{name}": value for name, value in getattr(results, section).items()}
    if results.memory is not None:
        columns |= {"memory.bytes": results.memory.bytes, "memory.kv_tokens": results.memory.kv_tokens}
    columns.pop("kl.teacher", None)
    return {name: finite(value) for name, value in columns.items()}


MEASUREMENTS: tuple[SweepMeasurement, ...] = (SweepMeasurement("results", run_results, kept=False),)


def measure_run(config: RunConfig, measurements: Sequence[SweepMeasurement] = MEASUREMENTS) -> Columns:
    """All columns of a finished run; what was kept is not measured again."""
    folder = RunFolder.of(config)
    columns: Columns = {}
    for measurement in measurements:
        file = folder.path / "measurements" / f"{measurement.name}.json"
        if measurement.kept and file.exists():
            kept = read_object(file, "it is measured anew")
            if not all(isinstance(value, float | int | None) for value in kept.values()):
                raise LolcatsError(f"{file} holds something that is not a number; delete it: it is measured anew")
            columns |= kept
            continue
        new = {name: finite(value) for name, value in measurement.measure(config, folder).items()}
        if measurement.kept:
            file.parent.mkdir(exist_ok=True)
            write_text(file, json.dumps(new, indent=2) + "\n")
        columns |= new
    return columns


def read_object(file: Path, then: str) -> dict[str, Any]:
    """The JSON object in a file, {} where there is none.

    Args:
        then: what happens where the file has been deleted.

    Raises:
        LolcatsError: it holds something else.
    """
    try:
        content = json.loads(file.read_bytes()) if file.exists() else {}
    except OSError as error:
        raise LolcatsError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
        raise LolcatsError(f"{file} is not JSON ({error}); delete it: {then}") from error
    if not isinstance(content, dict):
        raise LolcatsError(f"{file}: expected a JSON object, got {str(content)[:40]!r}; delete it: {then}")
    return content


def finite(value: float | None) -> float | None:
    """JSON has no infinity: None stands for it."""
    return value if value is not None and math.isfinite(value) else None
