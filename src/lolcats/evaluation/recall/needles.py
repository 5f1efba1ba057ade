"""Needle tasks after RULER (arXiv 2404.06654): values of "magic" keys, said once somewhere in a long text."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lolcats.evaluation.recall.haystack import NOISE, fit, hide
from lolcats.evaluation.recall.words import ADJECTIVES, NOUNS


@dataclass(frozen=True)
class Prompt:
    """What a model reads, and what its continuation is compared with."""

    ids: list[int]
    """Tokens of the prompt."""
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    """For each answer, the share of the filler that stands before it: 0 is the beginning."""


@dataclass(frozen=True)
class NeedleTask:
    """Which needles, in which hay."""

    prose: bool = True
    """Hay is prose instead of repeated noise."""
    values: str = "numbers"
    """Or "uuids"."""
    asked: int = 1
    """Keys that are asked for."""
    distractors: int = 0
    """Other keys with values of their own."""


def needle_prompt(
    task: NeedleTask,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    depth: float,
    rng: np.random.Generator,
    essay: Sequence[str],
) -> Prompt:
    """A prompt of `room` tokens, see `fit`.

    Args:
        task: what is hidden.
        tokenizer: counts.
        room: tokens of the prompt.
        depth: of the needle, where a single key is asked for (0 to 1); several keys, and distractors, lie anywhere.
        rng: where keys, values and other depths come from.
        essay: sentences of prose; they begin at one that is drawn.

    Raises:
        DataError: there is no room for the needles and one sentence.
    """
    keys = _keys(rng, task.asked + task.distractors)
    values = [_value(rng, task.values) for _ in keys]
    depths = [depth if task.asked == 1 else float(rng.random()), *(float(d) for d in rng.random(len(keys) - 1))]
    needles = [
        f"One of the special magic {task.values} for {key} is: {value}."
        for key, value in zip(keys, values, strict=True)
    ]
    start = int(rng.integers(len(essay))) if task.prose else 0
    hay = [*essay[start:], *essay[:start]] if task.prose else NOISE
    opening, question = _frame(task, keys[: task.asked])

    def write(sentences: int) -> tuple[str, str]:
        return f"{opening}\n{hide(hay, sentences, needles, depths)}", question

    ids, sentences = fit(write, hay, tokenizer, room)
    reached = tuple(round(d * sentences) / sentences for d in depths[: task.asked])
    return Prompt(ids, tuple(values[: task.asked]), reached)


def _frame(task: NeedleTask, asked: Sequence[str]) -> tuple[str, str]:
    """What stands before and after the hay; the end is the beginning of the answer."""
    one = task.asked == 1
    what = f"special magic {task.values[:-1] if one else task.values}"
    names = asked[0] if one else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    opening = f"A few special magic {task.values} are hidden in this text. Memorize them for the question at its end."
    asking = f"What {'is' if one else 'are all'} the {what} for {names} in the text above?"
    return opening, f"{asking} The {what} for {names} in the text above {'is' if one else 'are'}"


def _keys(rng: np.random.Generator, count: int) -> list[str]:
    """Different pairs of an adjective and a noun."""
    picked = rng.choice(len(ADJECTIVES) * len(NOUNS), size=count, replace=False)
    return [f"{ADJECTIVES[i % len(ADJECTIVES)]}-{NOUNS[i // len(ADJECTIVES)]}" for i in picked.tolist()]


def _value(rng: np.random.Generator, kind: str) -> str:
    if kind == "uuids":
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))
    return str(rng.integers(10**6, 10**7))
