"""The first screen: quality beside the controls, memory, cost and the verdict of one run or model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lolcats.config.mixers import BlendConfig
from lolcats.printable import show_bytes
from lolcats.report.subject import Subject
from lolcats.report.verdict import Finding, verdict
from lolcats.variants import TRAINED_WINDOW, label, score_cells

MAIN = ("teacher", "student", TRAINED_WINDOW, "equal_window")
"""Variants that the summary sets apart from the other controls."""


@dataclass
class Summary:
    """What a person needs first of one run or model."""

    name: str
    about: str
    """Teacher, layer and text, in one line."""
    unfinished: str
    findings: list[Finding]
    quality: list[tuple[str, list[str], bool]]
    """(variant, perplexity, ratio and distance as `lolcats evaluate` shows them, whether it is one of `MAIN`)."""
    quality_text: str
    memory: list[tuple[str, str, str, str]]
    """(tokens, the teacher's cache, the student's, how many times less)."""
    memory_text: str
    cost: list[tuple[str, str]]
    lacking: list[tuple[str, str, str]]
    """(variant that was not measured, why, the command that does)."""
    notes: list[str]


def summary(subject: Subject) -> Summary:
    """The first screen of one."""
    results = subject.results
    scores = next(subject.scores(), None)
    names = {} if scores is None else scores.perplexity
    quality = [
        (label(name), cells, name in MAIN)
        for name, cells in score_cells(names, {} if scores is None else scores.kl)
    ]  # fmt: skip
    lacking = [(label(name), *_advice(subject, name)) for name in MAIN if name not in names]
    where = ", ".join(filter(None, (results.device, results.dtype, results.date)))
    return Summary(
        name=subject.name,
        about=f"Teacher {results.model or subject.config.model}. {_layer(subject)}.",
        unfinished=subject.unfinished,
        findings=verdict(subject),
        quality=quality,
        quality_text="" if scores is None else f"{_measured_on(subject)} {where}",
        memory=[] if subject.sizes is None else [_memory_row(*row) for row in subject.sizes.memory()],
        memory_text="" if results.memory is None else f"{_capital(results.memory.line())}.",
        cost=list(_cost(subject)),
        lacking=lacking,
        notes=[*subject.notes, *_notes(subject), *results.data_notes],
    )


def _layer(subject: Subject) -> str:
    """The layer in words, with the sizes that its budget found."""
    layer, split = subject.config.linearization, subject.results.split
    if isinstance(layer, BlendConfig) and layer.searches and split is not None:
        layer = layer.model_copy(update={"split": split})
    return layer.in_words()


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _advice(subject: Subject, name: str) -> tuple[str, str]:
    """Why a variant was not measured, and the command that does."""
    if name == TRAINED_WINDOW:
        return subject.window_advice
    return "Not measured.", subject.evaluate_command(*(() if name in ("teacher", "student") else (name,)))


def _notes(subject: Subject) -> Iterator[str]:
    """What results and analysis say of what failed or is not known."""
    for notes in (subject.results.notes, {} if subject.analysis is None else subject.analysis.notes):
        yield from (f"{name}: {note}" for name, note in notes.items())


def _measured_on(subject: Subject) -> str:
    """When, on which text and on how much of it the first perplexities were measured."""
    results = subject.results
    if not results.perplexity:
        file = subject.evaluations[0]
        return f"Measured by lolcats evaluate ({file.file.name}), in texts of {file.length:,} tokens."
    sources = [Path(str(source)) for source in results.measured_with.get("sources") or []]
    names = ", ".join(source.name if source.is_absolute() else str(source) for source in sources)
    length, counted = results.evaluation.length, results.evaluation.tokens
    words = "Measured when the run was made" + (f", on {names}" if names else "")
    words += f", in texts of {length:,} tokens" if length else ""
    return words + ("." if counted is None else f". {counted:,} tokens were predicted and counted.")


def _memory_row(tokens: int, teacher: int, own: int) -> tuple[str, str, str, str]:
    return f"{tokens:,}", show_bytes(teacher), show_bytes(own), f"{teacher / own:,.1f}x" if own else "-"


def _cost(subject: Subject) -> Iterator[tuple[str, str]]:
    """Tokens, time and trained parameters, stage by stage."""
    results, sizes = subject.results, subject.sizes
    for stage, name in (("transfer", "stage 1"), ("finetune", "stage 2"), (TRAINED_WINDOW, "the window's training")):
        words = []
        if (tokens := results.tokens.get(stage)) is not None:
            words.append(f"{tokens:,} tokens")
        if (seconds := results.seconds.get(stage)) is not None:
            words.append(show_time(seconds))
        if sizes is not None and stage in sizes.trained:
            share = sizes.trained[stage] / sizes.parameters
            words.append(f"{sizes.trained[stage]:,} parameters trained ({share:.2%})")
        if words:
            yield name, ", ".join(words)
    if (total := results.seconds.get("total")) is not None:
        yield "all, with loading and measuring", show_time(total)


def show_time(seconds: float) -> str:
    """Seconds, or minutes where there are many."""
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.1f} min"
