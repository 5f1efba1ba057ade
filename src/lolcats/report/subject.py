"""What a report knows of one run or model."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lolcats.config import RunConfig
from lolcats.config.mixers import BlendConfig
from lolcats.evaluation.analysis import Analysis
from lolcats.evaluation.analysis.file import LayerAnalysis
from lolcats.evaluation.recall import Cell
from lolcats.evaluation.trained_window import has_window
from lolcats.report.measured import BenchmarkFile, EvaluateFile, RecallFile
from lolcats.report.sizes import Sizes
from lolcats.runs.results import Results
from lolcats.variants import NEAR_ONLY, TRAINED_WINDOW, WINDOW_ONLY


class Scores(NamedTuple):
    """Perplexities of one text: those of the run itself, or of one file of `lolcats evaluate`."""

    text: str
    """Where they are from, for people."""
    perplexity: dict[str, float | None]
    kl: dict[str, float | None]
    by_position: dict[str, dict[str, float | None]]
    context: int | None
    """Tokens that the teacher was made for, where that is known."""


@dataclass
class Subject:
    """One run or model."""

    name: str
    """What the page calls it; different for each."""
    place: Path
    """Its folder, as it was given."""
    config: RunConfig
    results: Results
    model: Path | None = None
    """The folder of its weights, where there is one."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl."""
    lora: list[dict[str, Any]] = field(default_factory=list)
    """Lines of lora.jsonl."""
    analysis: Analysis | None = None
    recalls: list[RecallFile] = field(default_factory=list)
    benchmarks: list[BenchmarkFile] = field(default_factory=list)
    evaluations: list[EvaluateFile] = field(default_factory=list)
    sizes: Sizes | None = None
    unfinished: str = ""
    """What is not done yet, "" of a finished run."""
    notes: list[str] = field(default_factory=list)
    """What could not be read or told."""

    @property
    def trained_length(self) -> int:
        """Tokens of the texts of its training."""
        return self.config.data.sequence_length

    @property
    def has_far(self) -> bool:
        """Whether its layers have a far half."""
        layer = self.config.linearization
        return not (isinstance(layer, BlendConfig) and layer.far == "none")

    @property
    def keeps_pairs(self) -> bool:
        """Whether its layers keep pairs of those that left the window."""
        return self.config.linearization.most_pairs > 0

    @property
    def without_far(self) -> str:
        """The control that is the student without its far half alone."""
        return NEAR_ONLY if self.keeps_pairs else WINDOW_ONLY

    def scores(self) -> Iterator[Scores]:
        """All perplexities, those of the run first."""
        found = self.results
        if found.perplexity:
            length = found.evaluation.length
            text = "measured when it was made" + (f", {length:,} tokens" if length else "")
            yield Scores(text, dict(found.perplexity), dict(found.kl), dict(found.by_position), None)
        for file in self.evaluations:
            scores = file.scores
            yield Scores(
                f"{file.file.name}, {file.length:,} tokens",
                {name: score.perplexity for name, score in scores.items()},
                {name: score.kl for name, score in scores.items()},
                {name: dict(score.by_position) for name, score in scores.items()},
                next((score.context for score in scores.values() if score.context is not None), None),
            )

    def cells(self) -> dict[tuple[str, str, int], Cell]:
        """(variant, task, length) -> what recall says of it; the first file that has it counts."""
        found: dict[tuple[str, str, int], Cell] = {}
        for cell in (cell for file in self.recalls for cell in file.cells):
            found.setdefault((cell.variant, cell.task, cell.length), cell)
        return found

    @property
    def layers(self) -> list[LayerAnalysis]:
        """What was found of its layers."""
        return [] if self.analysis is None else self.analysis.layers or []

    @property
    def window_advice(self) -> tuple[str, str]:
        """Why the trained window was not measured, and the command that does, "" where it is too late."""
        if self.model is not None and has_window(self.model):
            return "The trained window was not measured.", self.evaluate_command(TRAINED_WINDOW)
        return f"No window was trained beside it, as evaluation.controls with {TRAINED_WINDOW} asks for.", ""

    def evaluate_command(self, *controls: str) -> str:
        """The command that measures teacher, student and some controls."""
        return self.command("evaluate", *(word for name in controls for word in ("--control", name)))

    @property
    def beyond_command(self) -> str:
        """The command that measures texts longer than those of the training."""
        return self.command("evaluate", "--beyond", "4", file="evaluate_beyond.json")

    @property
    def resume_command(self) -> str:
        """The command that goes on with a run."""
        return shlex.join(["lolcats", "linearize", str(self.place / "config.yaml"), "--resume"])

    def command(self, verb: str, *words: str, file: str = "") -> str:
        """What measures something of it, with the numbers beside it, where the next report finds them."""
        target = self.place / (file or f"{verb}.json")
        return shlex.join(["lolcats", verb, str(self.place), *words, "--json", str(target)])
