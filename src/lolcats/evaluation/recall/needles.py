"""Prompts of the recall tasks: passkeys; and after RULER (arXiv 2404.06654) "magic" keys whose values are said once in
a long text, and variables that hold a value through a chain of assignments."""

from __future__ import annotations

import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from lolcats.data.passkey import passkey_sample
from lolcats.evaluation.recall.haystack import NOISE, encode, fit, hide

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
class Request:
    """What a prompt is made of."""

    tokenizer: PreTrainedTokenizerBase
    room: int
    """Tokens of the prompt, without its answer."""
    length: int
    """The same with it."""
    depth: float
    """Of the needle, where there is a single one: 0 to 1. Several, and distractors, lie anywhere."""
    rng: np.random.Generator
    essay: Sequence[str]
    """Sentences of prose; empty for tasks that hide in noise."""


def passkey_prompt(request: Request) -> Prompt:
    """Whole sentences of noise, so it may have less than its tokens."""
    sample = passkey_sample(request.rng, request.tokenizer, request.length, request.depth)
    return Prompt(encode(request.tokenizer, sample.prompt), (sample.key,), (sample.depth,))


def needle_prompt(request: Request, kind: str = "numbers", asked: int = 1, distractors: int = 0) -> Prompt:
    """Values under keys.

    Args:
        request: the text; it begins at a sentence of its prose that is drawn.
        kind: of values: numbers or uuids.
        asked: keys that are asked for.
        distractors: other keys with values of their own.

    Raises:
        DataError: there is no room for the needles and one sentence.
    """
    rng = request.rng
    keys = _keys(rng, asked + distractors)
    values = [_value(rng, kind) for _ in keys]
    depths = [request.depth if asked == 1 else float(rng.random()), *map(float, rng.random(len(keys) - 1))]
    needles = [f"One of the special magic {kind} for {key} is: {v}." for key, v in zip(keys, values, strict=True)]
    start = int(rng.integers(len(request.essay))) if request.essay else 0
    hay = [*request.essay[start:], *request.essay[:start]] or NOISE
    opening, question = _frame(kind, keys[:asked])

    def write(sentences: int) -> tuple[str, str]:
        return f"{opening}\n{hide(hay, sentences, needles, depths)}", question

    ids, sentences = fit(write, hay, request.tokenizer, request.room)
    return Prompt(ids, tuple(values[:asked]), _reached(depths[:asked], sentences))


def _reached(depths: Sequence[float], sentences: int) -> tuple[float, ...]:
    """Needles stand between sentences."""
    return tuple(round(depth * sentences) / sentences for depth in depths)


def _frame(kind: str, asked: Sequence[str]) -> tuple[str, str]:
    """What stands before and after the hay; the end is the beginning of the answer."""
    one = len(asked) == 1
    what = f"special magic {kind[:-1] if one else kind}"
    names = asked[0] if one else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    opening = f"A few special magic {kind} are hidden in this text. Memorize them for the question at its end."
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


def tracking_prompt(request: Request) -> Prompt:
    """A solved short example, then a chain hidden in noise; its links come in their order.

    Raises:
        DataError: there is no room for the example and the chain.
    """
    rng = request.rng
    names, value = _names(rng, HOPS + 1, letters=5), str(rng.integers(10_000, 100_000))
    other, known = _names(rng, HOPS + 1, letters=3), str(rng.integers(10_000, 100_000))
    example = "\n".join(_assignments(other, known, _EXAMPLE_SENTENCES, _depths(rng, len(other))))
    depths = _depths(rng, len(names))

    def write(sentences: int) -> tuple[str, str]:
        text, question = _assignments(names, value, sentences, depths)
        return f"{example} {', '.join(other)}\n\n{text}", question

    ids, sentences = fit(write, NOISE, request.tokenizer, request.room, least=len(names))
    return Prompt(ids, tuple(names), _reached(depths, sentences))


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
