"""Training that stops in the middle, as if its process were killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lolcats.training import Reporter


class Killed(BaseException):
    """What a killed process looks like from inside."""


class Killer(Reporter):
    """Raises after the given step."""

    def __init__(self, path: Path | None, at: int) -> None:
        super().__init__(path)
        self.at = at

    def step(self, bar: Any, stage: str, step: int, *args: Any, **kwargs: Any) -> None:
        super().step(bar, stage, step, *args, **kwargs)
        if step == self.at:
            raise Killed
