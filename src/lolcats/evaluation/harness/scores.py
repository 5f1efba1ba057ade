"""What was measured, in numbers: of every task the metric that the paper reports, over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lolcats.evaluation.memory import TextMemory

PAPER_METRICS = {"arc_challenge": "acc_norm", "hellaswag": "acc_norm"}
USUAL_METRICS = ("acc", "exact_match", "em", "acc_norm", "f1", "word_perplexity", "perplexity")
"""Of tasks that the paper does not have, the first of these, else the first that lm-eval lists."""
SHARES = ("acc", "acc_norm", "exact_match", "em")
"""Metrics that are shares of right answers, which an average may be taken of."""


@dataclass
class Score:
    """One task under one variant."""

    mean: float
    """Over the seeds."""
    sd: float | None
    """Standard deviation over the seeds; None of one seed."""
    stderr: float | None
    """lm-eval's standard error over the questions, of the first seed; None where it has none."""
    values: list[float]
    """One a seed."""


@dataclass
class Row:
    """One task under all variants."""

    task: str
    metric: str
    """As lm-eval calls it, with its filter: "acc,none"."""
    examples: str
    """Examples in the prompt, such as "5"; "0/5" where the parts of a group differ."""
    questions: int
    higher_is_better: bool
    scores: dict[str, Score] = field(default_factory=dict)

    @property
    def is_share(self) -> bool:
        """Whether it is a share of right answers."""
        return self.metric.partition(",")[0] in SHARES


@dataclass
class Scores:
    """The table of an evaluation and, for the record, all that lm-eval said."""

    rows: list[Row]
    results: dict[str, dict[str, Any]]
    """variant -> seed -> lm-eval's results, by task, parts of groups included."""
    truncated: dict[str, int] = field(default_factory=dict)
    """task -> prompts whose start was cut because they were too long."""
    device: str = ""
    dtype: str = ""
    """Of the first variant's weights."""
    memory: TextMemory | None = None
    """Of a linearized model."""

    def add(self, benchmark: str, rows: Mapping[str, Sequence[str]], answers: Mapping[str, Mapping[str, Any]]) -> None:
        """Put in what was measured of one task or group.

        Args:
            benchmark: its name.
            rows: the results to show, each with the tasks that it sums up (itself, where it is a task).
            answers: variant -> seed -> what lm-eval said.
        """
        self.rows += [_row(name, tasks, answers) for name, tasks in rows.items()]
        for variant, of_seeds in answers.items():
            for seed, answer in of_seeds.items():
                self.results[variant].setdefault(seed, {}).update(answer["results"])
        if cut := max(answer["truncated"] for of_seeds in answers.values() for answer in of_seeds.values()):
            self.truncated[benchmark] = cut

    def averages(self) -> dict[str, dict[str, float]]:
        """Means over tasks, by name and variant, as in the paper: of all, and without the tasks of MMLU."""
        if len(self.rows) < 2 or not all(row.is_share for row in self.rows):
            return {}
        found = {"average": _average(self.rows)}
        others = [row for row in self.rows if not row.task.startswith("mmlu")]
        if 1 < len(others) < len(self.rows):
            found = {"average without mmlu": _average(others), **found}
        return found


def _row(name: str, tasks: Sequence[str], answers: Mapping[str, Mapping[str, Any]]) -> Row:
    by_variant = {variant: list(of_seeds.values()) for variant, of_seeds in answers.items()}
    first = next(iter(by_variant.values()))[0]
    metric = choose_metric(name, first["results"][name])
    base, _, kind = metric.partition(",")
    row = Row(
        name,
        metric,
        examples="/".join(map(str, sorted({first["n-shot"][task] for task in tasks}))),
        questions=sum(first["n-samples"][task]["effective"] for task in tasks),
        higher_is_better=all(first["higher_is_better"][task].get(base, True) is not False for task in tasks),
    )
    for variant, found in by_variant.items():
        values = [float(answer["results"][name][metric]) for answer in found]
        spread = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
        error = found[0]["results"][name].get(f"{base}_stderr,{kind}")
        error = error if isinstance(error, int | float) else None
        row.scores[variant] = Score(statistics.fmean(values), spread, error, values)
    return row


def choose_metric(task: str, results: Mapping[str, Any]) -> str:
    """The key of the metric to show, such as "acc,none"."""
    keys = [
        key for key, value in results.items() if "," in key and "_stderr," not in key and isinstance(value, int | float)
    ]
    for wanted in (PAPER_METRICS.get(task), *USUAL_METRICS):
        for key in keys:
            if key.partition(",")[0] == wanted:
                return key
    return keys[0]


def _average(rows: list[Row]) -> dict[str, float]:
    return {variant: statistics.fmean(row.scores[variant].mean for row in rows) for variant in rows[0].scores}
