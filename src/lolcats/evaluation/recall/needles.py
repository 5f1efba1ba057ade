"""Prompts after RULER (arXiv 2404.06654): "magic" keys whose values are said once in a long text, and variables that
hold a value through a chain of assignments."""

from __future__ import annotations

import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lolcats.evaluation.recall.haystack import NOISE, fit, hide

_ADJECTIVES = """
amber ample arctic bashful bitter brave brisk calm candid clever cosmic crisp curious dapper daring dusty eager
earnest faint fierce fluffy frosty gentle giddy golden grumpy hasty hidden hollow humble icy jolly keen lavish
lively lonely loud lucid mellow merry mighty modest narrow nimble noble odd patient placid polite proud quaint
quick quiet rapid rugged rustic sharp shiny silent sleepy sly smooth solemn spry steep sturdy subtle sunny swift
tame tender tidy tiny vast velvet vivid wary wild witty zesty
"""
_NOUNS = """
acorn anchor anvil apron badger banner barrel basket beacon bellows birch blanket bridge bucket button cabin
candle canyon carpet castle cedar chalk cherry comet copper coral cradle cricket dagger desert drum engine
falcon feather ferry fiddle garden glacier goblet hammer harbor helmet island jacket kettle ladder lantern lemon
lizard magnet marble meadow mirror needle nutmeg oyster paddle parcel pebble pepper pigeon pillow planet puddle
quilt rabbit ribbon rocket saddle salmon shovel spider sponge statue teapot thistle ticket trumpet tunnel turtle
violin walnut whistle willow window wizard
"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()

HOPS = 4
"""Assignments of one variable to the next: a chain has one name more."""
_EXAMPLE_SENTENCES = 10


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


def tracking_prompt(
    tokenizer: PreTrainedTokenizerBase, room: int, rng: np.random.Generator, hops: int = HOPS
) -> Prompt:
    """A solved short example, then a chain hidden in noise: `room` tokens, see `fit`.

    Args:
        tokenizer: counts.
        room: tokens of the prompt.
        rng: where names, the value and the depths come from. The links of the chain come in their order.
        hops: links after the first.

    Raises:
        DataError: there is no room for the example and the chain.
    """
    names, value = _names(rng, hops + 1, letters=5), str(rng.integers(10_000, 100_000))
    other, known = _names(rng, hops + 1, letters=3), str(rng.integers(10_000, 100_000))
    example = "\n".join(_assignments(other, known, _EXAMPLE_SENTENCES, _depths(rng, len(other))))
    depths = _depths(rng, len(names))

    def write(sentences: int) -> tuple[str, str]:
        text, question = _assignments(names, value, sentences, depths)
        return f"{example} {', '.join(other)}\n\n{text}", question

    ids, sentences = fit(write, NOISE, tokenizer, room, least=len(names))
    return Prompt(ids, tuple(names), tuple(round(d * sentences) / sentences for d in depths))


def _assignments(names: Sequence[str], value: str, sentences: int, depths: Sequence[float]) -> tuple[str, str]:
    """What stands before the question, and the question."""
    sources = [value, *(f"VAR {name}" for name in names)]
    chain = [f"VAR {name} = {source}." for name, source in zip(names, sources, strict=False)]
    opening = "Follow the variables that are assigned in this text; their assignments are hidden in it."
    question = f"Question: Find all variables that hold the value {value} in the text above."
    answer = f"Answer: {len(names)} variables in the text above hold the value {value}, they are:"
    return f"{opening}\n{hide(NOISE, sentences, chain, depths)}", f"{question} {answer}"


def _depths(rng: np.random.Generator, count: int) -> list[float]:
    return sorted(float(depth) for depth in rng.random(count))


def _names(rng: np.random.Generator, count: int, letters: int) -> list[str]:
    """Different names, none part of another."""
    alphabet = list(string.ascii_uppercase)
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice(alphabet, letters))] = None
    return list(names)
