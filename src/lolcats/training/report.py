"""What a run says while it trains: lines in metrics.jsonl and a progress bar."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lolcats.files import write_bytes


class Reporter:
    """Writes metrics.jsonl (None: nowhere) and draws progress on `console` (None: silently)."""

    def __init__(self, path: Path | None = None, console: Console | None = None, enabled: bool = True) -> None:
        self.path = path if enabled else None
        self.console = console if enabled else None
        self._progress: Progress | None = None

    @contextmanager
    def stage(self, name: str, steps: int, done: int) -> Iterator[Any]:
        """A progress bar for `steps` steps of which `done` are done already."""
        if self.console is None:
            yield None
            return
        columns = (
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, refresh_per_second=2) as progress:
            self._progress = progress
            yield progress.add_task(name, total=steps, completed=done, loss="-", speed="-")
        self._progress = None

    def say(self, text: str) -> None:
        """A line for the person watching."""
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(
        self, bar: Any, stage: str, step: int, values: Mapping[str, Any], lr: float, speed: float, tokens: int
    ) -> None:
        """One optimiser step."""
        rounded = {k: v for k, v in values.items() if not isinstance(v, list)}
        self._write({"stage": stage, "step": step, "tokens": tokens, "lr": lr, "tokens_per_second": speed, **rounded})
        if self._progress is not None:
            self._progress.update(bar, completed=step, loss=f"{values['loss']:.4g}", speed=f"{speed:,.0f}")

    def validation(self, stage: str, step: int, values: Mapping[str, Any], tokens: int) -> None:
        """One validation; lists (a value a layer) are kept."""
        named = {f"validation_{k}": v for k, v in values.items()}
        self._write({"stage": stage, "step": step, "tokens": tokens, **named})
        if self._progress is not None:
            recall = ""
            if "recall_accuracy" in values:
                recall = f", {values['recall_accuracy']:.0%} of answers right within {values['recall_gap']:,} tokens"
            self._progress.console.print(f"{stage:<9} step {step}: validation loss {values['loss']:.4g}{recall}")

    def resumed(self, stage: str, step: int) -> None:
        """Drop lines written after the checkpoint from which the stage goes on, and what is no line of metrics."""
        if self.path is None or not self.path.exists():
            return
        content = self.path.read_bytes()
        lines = content.splitlines()
        read = [(line, found) for line in lines if (found := _read_line(line)) is not None]
        lost = len(lines) - len(read)
        if lost - (not content.endswith(b"\n")) > 0 and self.console is not None:  # a kill leaves one half line
            self.say(f"{self.path}: {lost} lines that are no metrics were dropped")
        kept = b"".join(line + b"\n" for line, found in read if not (found[0] == stage and found[1] > step))
        if kept != content:
            write_bytes(self.path, kept)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _read_line(line: bytes) -> tuple[str, int] | None:
    """Stage and step of a line of metrics, None where it is none."""
    try:
        found = json.loads(line)
        return (found["stage"], found["step"]) if type(found["step"]) is int else None
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
