"""What was measured: a row for each model, batch and context, and the file of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

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
        own = {name: value for name, value in asdict(self).items() if name not in ("times", "limit")}
        times = asdict(self.times)
        step, first = times.pop("step"), times.pop("first_token")
        seconds = {"first_token_seconds": first, "step_seconds": step, "step_limit_seconds": self.limit}
        speeds = {"prefill_tokens_per_second": self.prefill_speed, "decode_tokens_per_second": self.decode_speed}
        return own | seconds | {"ratio": self.ratio} | speeds | times


def to_csv(rows: Iterable[Row], about: Mapping[str, object]) -> str:
    """A line a row, with `about` repeated in each, so that files can be joined; empty where memory ran out."""
    lines = [row.numbers() | dict(about) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
