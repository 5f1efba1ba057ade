"""results.json: what a run has measured so far, as version 2 writes it.

Version 0.1 of this package wrote no version, no memory, and numbers that are not finite as NaN and Infinity. Its files
are read too. Keys of later versions are kept, and written again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lolcats.errors import LolcatsError, first_problem
from lolcats.evaluation import Measurement
from lolcats.evaluation.memory import TextMemory
from lolcats.files import finite, read_json_object

VERSION = 2
RESUME = "delete it and resume: what it held is measured again"
NOT_FINITE = {True: "infinite", False: "not a number"}
"""What a note says of a number that JSON does not have, which is null."""

TIMES = {"loading": "loading", "transfer": "transfer", "finetune": "fine-tuning"}
TIMES |= {"trained_window": "the trained window", "measuring": "measuring"}
"""What the seconds of a run go to, and how people are told."""

Number = float | None
"""None is a number that was not finite."""
Names = dict[str, Number]


def _filled(value: object) -> object:
    return {} if value is None else value


_Filled = BeforeValidator(_filled)
"""A section that is null holds nothing."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class EvaluationFacts(_Section):
    """The text that was measured on."""

    segments: int | None = None
    length: int | None = None
    """Tokens of a segment."""
    last: int | None = None
    """Only so many tokens of each were counted, from its end; None: all but the first."""
    tokens: int | None = None
    """Counted in all."""


class Best(_Section):
    """The checkpoint of a stage that was kept."""

    step: int
    loss: Number


class Results(_Section):
    """What is known of a run, its model and its text; sections of numbers are by the name of a variant or stage."""

    version: int = VERSION
    date: str | None = None
    model: str | None = None
    """The teacher."""
    device: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    seed: int | None = None
    evaluation: Annotated[EvaluationFacts, _Filled] = Field(default_factory=EvaluationFacts)
    memory: TextMemory | None = None
    split: list[Any] | None = None
    """`linearization.split` as it was found, where layers share a budget."""
    perplexity: Annotated[Names, _Filled] = Field(default={})
    kl: Annotated[Names, _Filled] = Field(default={})
    """Divergence of the predictions from the teacher's, nats a token."""
    by_position: Annotated[dict[str, Names], _Filled] = Field(default={})
    """Perplexity of the tokens at "start-end" of their segment."""
    tokens: Annotated[dict[str, int | None], _Filled] = Field(default={})
    """That a stage was trained on."""
    tokens_per_second: Annotated[dict[str, float], _Filled] = Field(default={})
    seconds: Annotated[dict[str, float], _Filled] = Field(default={})
    """Of loading, of the steps of each stage, of measuring; total is more: validation, checkpoints, samples, saving."""
    generation: Annotated[dict[str, str], _Filled] = Field(default={})
    """The prompt, and what teacher and student wrote after it."""
    best: Annotated[dict[str, Best], _Filled] = Field(default={})
    changes: Annotated[dict[str, list[str]], _Filled] = Field(default={})
    """Settings of a stage that were changed while it went on."""
    notes: Annotated[dict[str, str], _Filled] = Field(default={})
    """What failed, or is not finite."""
    data_notes: list[str] = Field(default=[])
    measured_with: dict[str, Any] = Field(default={})
    """The settings of the evaluation."""
    complete: bool = False

    @model_validator(mode="after")
    def _upgrade(self) -> Results:
        self.version = max(self.version, VERSION)
        return self

    def store(self, name: str, score: Measurement) -> None:
        """Put in what a variant scores."""
        self.perplexity[name] = score.perplexity
        if score.kl is not None:
            self.kl[name] = score.kl
        self.by_position[name] = dict(score.by_position)
        self.evaluation.tokens = score.tokens

    def add_seconds(self, what: str, seconds: float) -> None:
        """Count in time spent on `what`, beside that of runs that this one goes on with."""
        self.seconds[what] = round(self.seconds.get(what, 0.0) + seconds, 2)

    def time_line(self) -> str:
        """Where the time went, for people; "" where the file does not say."""
        parts = {label: self.seconds[name] for name, label in TIMES.items() if name in self.seconds}
        if (total := self.seconds.get("total")) is None or "measuring" not in parts:
            return ""
        parts["validation, samples and saving"] = max(0.0, total - sum(parts.values()))
        return f"time: {', '.join(f'{value:,.0f} s {name}' for name, value in parts.items())}; {total:,.0f} s in all"

    def forget_measurements(self) -> None:
        """Leave out what was measured on another text or in another way."""
        for section in (self.perplexity, self.kl, self.by_position, self.notes):
            section.clear()

    def forget_notes(self, names: list[str]) -> None:
        """Leave out notes on what is done again."""
        for name in names:
            self.notes.pop(name, None)

    def text(self) -> str:
        """The content of the file, in which every number is finite."""
        content = self.model_dump()
        found = dict(_not_finite(content))
        null = {*found, *(path for path in self.notes if _at(content, path) is None)}
        kept = {name: note for name, note in self.notes.items() if name in null or note not in NOT_FINITE.values()}
        content["notes"] = kept | found
        return json.dumps(finite(content), indent=2, allow_nan=False) + "\n"


def read_results(file: Path, then: str = RESUME) -> Results:
    """The content of results.json of any version; nothing measured where there is none.

    Args:
        file: the file of a run, or the copy in its model's folder.
        then: what the user can do about a broken file.

    Raises:
        LolcatsError: it is not what `lolcats` writes there.
    """
    content = read_json_object(file, then)
    try:
        return Results.model_validate(_noted(content))
    except (ValidationError, RecursionError, OverflowError) as error:
        raise LolcatsError(f"{file} cannot be used: {first_problem(error)}; {then}") from error


def _noted(content: dict[str, Any]) -> dict[str, Any]:
    """A file of version 0.1 with its infinities as null and a note on each."""
    found = dict(_not_finite(content))
    notes = content.get("notes") or {}
    return finite(content) | ({"notes": notes | found} if found and isinstance(notes, dict) else {})


def _not_finite(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and note of each number that is not finite."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, NOT_FINITE[math.isinf(value)]


def _at(content: Any, path: str) -> Any:
    """The value at a dotted name; "" where there is none."""
    for key in path.split("."):
        if not isinstance(content, dict) or key not in content:
            return ""
        content = content[key]
    return content
