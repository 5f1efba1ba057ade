"""The parts of the page after the summary, each with its figures and with what is lacking."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence

from lolcats.evaluation.harness import Row
from lolcats.report.charts.attention import TextMaps, attention_figure
from lolcats.report.charts.curves import curve_figures
from lolcats.report.charts.kept import kept_figures
from lolcats.report.charts.layers import layer_figures
from lolcats.report.charts.lora import lora_figures
from lolcats.report.charts.memory import cache_figure, memory_figures, points_of
from lolcats.report.charts.quality import error_figure, position_figure
from lolcats.report.charts.recall import recall_figures
from lolcats.report.figure import Figure, Lacking, Section, Table
from lolcats.report.subject import Subject
from lolcats.variants import ordered, short_label


def make_sections(
    subjects: Sequence[Subject], maps: Sequence[TextMaps], first_head: int | None = None
) -> tuple[list[Section], list[Lacking]]:
    """The parts for which there is something to show, in the order of the story, and the others.

    Args:
        subjects: runs and models.
        maps: of attention.
        first_head: the head that they show at first.
    """
    first = subjects[0]
    report = shlex.join(["lolcats", "report", *(str(subject.place) for subject in subjects)])
    makers: list[tuple[str, str, Callable[[], Iterable[Figure | None]], str]] = [
        ("quality", "Perplexity and benchmarks", lambda: _quality(subjects), first.command("evaluate")),
        ("memory", "Memory", lambda: _memory(subjects), ""),
        ("recall", "Recall", lambda: recall_figures(subjects), first.command("recall", "passkey,niah_single_2")),
        ("layers", "Layers and heads", lambda: [*layer_figures(subjects), error_figure(subjects)], report),
        ("kept", "Kept pairs", lambda: kept_figures(subjects), report),
        ("attention", "Attention", lambda: [attention_figure(maps, _worst(subjects, first_head))], report),
        ("training", "Training", lambda: curve_figures(subjects), ""),
        ("lora", "LoRA", lambda: lora_figures(subjects), ""),
    ]  # fmt: skip
    found: list[Section] = []
    lacking: list[Lacking] = []
    for key, title, make, command in makers:
        figures = [figure for figure in make() if figure is not None]
        if figures:
            found.append(Section(key, title, figures, points_of(subjects)[1] if key == "memory" else ""))
        elif _concerns(key, subjects):
            lacking.append(Lacking(title, _WITHOUT[key], command))
    return found, lacking


_WITHOUT = {
    "quality": "not measured.",
    "recall": "not measured.",
    "layers": "not analysed yet.",
    "kept": "not analysed yet.",
    "attention": "not analysed yet.",
    "training": "the folder of a model has no metrics.jsonl, that of its run has.",
    "lora": "nothing of it was written down in training.",
    "memory": "not known of models without their folder and results.",
}


def _concerns(key: str, subjects: Sequence[Subject]) -> bool:
    """Whether any of the models has what a section is about."""
    if key == "kept":
        return any(subject.keeps_pairs for subject in subjects)
    if key == "lora":
        return any(s.config.finetune.enabled and s.config.finetune.method == "lora" for s in subjects)
    return True


def _worst(subjects: Sequence[Subject], head: int | None) -> tuple[int | None, int | None]:
    """The layer with the largest error of the first run, and the head given or that with the largest error in it."""
    layer = max(subjects[0].layers, key=lambda layer: layer.relative_error or 0.0, default=None)
    if layer is None or not layer.heads:
        return None, head
    worst = max(layer.heads, key=lambda one: one.relative_error or 0.0)
    return layer.layer, worst.head if head is None else head


def _quality(subjects: Sequence[Subject]) -> list[Figure | None]:
    return [position_figure(subjects), _perplexity_table(subjects), _benchmark_table(subjects)]


def _memory(subjects: Sequence[Subject]) -> list[Figure | None]:
    return [cache_figure(subjects), *memory_figures(subjects, points_of(subjects)[0])]


def _perplexity_table(subjects: Sequence[Subject]) -> Figure | None:
    """Every perplexity of every text, as files have it."""
    rows = [
        [subject.name, scores.text, short_label(name), scores.perplexity[name], scores.kl.get(name)]
        for subject in subjects
        for scores in subject.scores()
        for name in ordered(scores.perplexity)
    ]
    if not rows:
        return None
    return Figure(
        key="perplexity",
        title="All perplexities",
        text="KL is the divergence of the predictions from the teacher's, in nats a token.",
        alt="Perplexity and divergence by run, text and variant.",
        table=Table(["run", "text", "variant", "perplexity", "KL to teacher"], rows),
    )


def _uncertain(rows: Sequence[Row]) -> str:
    """How much of a difference may be chance."""
    shares = [score for row in rows for score in row.scores.values() if 0 <= score.mean <= 1]
    errors = [score.stderr for score in shares if score.stderr is not None]
    return f" Their standard error is at most {max(errors):.3f}." if errors else ""


def _benchmark_table(subjects: Sequence[Subject]) -> Figure | None:
    """A row a task, a column a variant; shares as shares."""
    found = [(s.name, row) for s in subjects for file in s.benchmarks for row in file.rows]
    if not found:
        return None
    variants = ordered(dict.fromkeys(name for _, row in found for name in row.scores))
    rows = [
        [run, row.task, row.metric.removesuffix(",none"), row.examples, row.questions,
         *(row.scores[name].mean if name in row.scores else None for name in variants)]
        for run, row in found
    ]  # fmt: skip
    return Figure(
        key="benchmarks",
        title="Benchmarks",
        text="Of lm-eval; shares of right answers are between 0 and 1." + _uncertain([row for _, row in found]),
        alt="Benchmarks by run and task.",
        table=Table(["run", "task", "metric", "shots", "questions", *map(short_label, variants)], rows),
    )
