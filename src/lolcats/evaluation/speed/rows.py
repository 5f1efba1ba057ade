"""What was measured: a row for each model, batch and context, and the file of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lolcats.evaluation.speed.measure import Times

ENGINE = "transformers"
"""What ran the model: forward passes with a cache, as in `generate`."""


@dataclass(frozen=True)
class Row:
    """One model at one batch and context. Times are seconds; None is out of memory."""

    engine: str
    variant: str
    """"student" or "teacher"."""
    attention: str
    """The mixer, or how softmax attention was computed."""
    dtype: str
    batch: int
    context: int
    """Tokens of each prompt."""
    tokens: int
    """Decoded for one measurement."""
    times: Times
    limit: float
    """Of a decoding step: its bytes at the bandwidth of a copy."""
    step_bytes: int
    """What a decoding step must move."""
    weight_bytes: int
    """Of it, what is read once for all texts."""
    text_bytes: int
    """What one text takes at the end, computed."""
    fit: int | None = None
    """Texts of this length that the engine has room for at once; None where it does not divide its memory before."""

    @property
    def prefill_speed(self) -> float | None:
        """Tokens of all prompts a second."""
        return None if self.times.first_token is None else self.batch * self.context / self.times.first_token

    @property
    def decode_speed(self) -> float | None:
        """New tokens of all texts a second."""
        return None if self.times.step is None else self.batch / self.times.step

    @property
    def ratio(self) -> float | None:
        """How many times the limit a decoding step takes."""
        return None if self.times.step is None else self.times.step / self.limit

    def numbers(self) -> dict[str, object]:
        """All of it by name, for files."""
        return {
            "engine": self.engine,
            "variant": self.variant,
            "attention": self.attention,
            "dtype": self.dtype,
            "steps": self.times.steps,
            "batch": self.batch,
            "context": self.context,
            "tokens": self.tokens,
            "first_token_seconds": self.times.first_token,
            "prefill_tokens_per_second": self.prefill_speed,
            "step_seconds": self.times.step,
            "step_limit_seconds": self.limit,
            "ratio": self.ratio,
            "decode_tokens_per_second": self.decode_speed,
            "step_bytes": self.step_bytes,
            "weight_bytes": self.weight_bytes,
            "text_memory": self.times.memory,
            "text_memory_computed": self.text_bytes,
            "text_memory_reading": self.times.reading_memory,
            "texts_that_fit": self.fit,
        }


def to_csv(rows: Iterable[Row], about: Mapping[str, object]) -> str:
    """A line a row, with `about` repeated in each, so that files can be joined; empty where memory ran out."""
    lines = [row.numbers() | dict(about) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
