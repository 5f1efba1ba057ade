"""What a run says while it trains: lines in metrics.jsonl and a progress bar."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lolcats.files import write_bytes
from lolcats.training.trackers import Trackers

LORA_FILE = "lora.jsonl"
"""Beside metrics.jsonl."""


class Reporter:
    """Writes metrics.jsonl, lora.jsonl beside it (None: nowhere), and draws progress on `console` (None: silently).

    Args:
        path: of metrics.jsonl.
        console: for progress.
        enabled: False in all processes but the main one: nothing is written or shown.
        trackers: are told what metrics.jsonl is told.
    """

    def __init__(
        self,
        path: Path | None = None,
        console: Console | None = None,
        enabled: bool = True,
        trackers: Trackers | None = None,
    ) -> None:
        self.path = path if enabled else None
        self._lora_path = None if self.path is None else self.path.with_name(LORA_FILE)
        self.console = console if enabled else None
        self.trackers = trackers if enabled and trackers is not None else Trackers()
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

    def lora(self, stage: str, step: int, modules: Mapping[str, tuple[float, float]], errors: Sequence[float]) -> None:
        """Norm and effective rank of the updates of modules, and errors of layers, after a step (0: before the first).

        Six digits of each are kept.
        """
        sizes = {name: [_short(value) for value in pair] for name, pair in modules.items()}
        line = {"stage": stage, "step": step, "modules": sizes, "errors": [_short(value) for value in errors]}
        _append(self._lora_path, line)

    def resumed(self, stage: str, step: int) -> None:
        """Drop lines written after the checkpoint from which the stage goes on, and what is no line of metrics."""
        for path in (self.path, self._lora_path):
            if path is not None and path.exists():
                self._cut(path, stage, step or -1)  # at its start a stage has not even a line of step 0
        self.trackers.resumed(stage, step)

    def _cut(self, path: Path, stage: str, step: int) -> None:
        content = path.read_bytes()
        lines = content.splitlines()
        read = [(line, found) for line in lines if (found := _read_line(line)) is not None]
        lost = len(lines) - len(read)
        if lost - (not content.endswith(b"\n")) > 0 and self.console is not None:  # a kill leaves one half line
            self.say(f"{path}: {lost} lines that are no metrics were dropped")
        kept = b"".join(line + b"\n" for line, found in read if not (found[0] == stage and found[1] > step))
        if kept != content:
            write_bytes(path, kept)

    def _write(self, line: Mapping[str, Any]) -> None:
        _append(self.path, line)
        self.trackers.log(line)


def _append(path: Path | None, line: Mapping[str, Any]) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _read_line(line: bytes) -> tuple[str, int] | None:
    """Stage and step of a line of metrics, None where it is none."""
    try:
        found = json.loads(line)
        return (found["stage"], found["step"]) if type(found["step"]) is int else None
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
