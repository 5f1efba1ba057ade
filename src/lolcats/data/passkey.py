"""Passkey samples: five digits said once inside filler text, and asked for at the end (Mohtashami and Jaggi, 2023)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lolcats.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The wording is the published one: models are compared on these very sentences.
_OPENING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
_FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = "What is the pass key? The pass key is"
DIGITS = 5


@dataclass(frozen=True)
class PasskeySample:
    """A question about a hidden number.

    Attributes:
        prompt: the text up to and with "The pass key is"; it begins with no special token.
        answer: a space and the digits: `prompt + answer` is the whole text.
        key: the digits alone.
        depth: share of the filler before the number that was reached, from 0 (the beginning) to 1 (the end).
        tokens: tokens of the whole text, with the begin token where the tokenizer adds one.
    """

    prompt: str
    answer: str
    key: str
    depth: float
    tokens: int


def passkey_sample(
    rng: np.random.Generator,
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    depth: float | None = None,
    *,
    digits: int = DIGITS,
) -> PasskeySample:
    """Hide a random number in as much filler as fits.

    Args:
        rng: where the number (and the depth, if it is None) comes from; the same state gives the same sample.
        tokenizer: counts tokens.
        length: the whole text, answer and begin token included, has at most this many tokens, and lacks at most a
            sentence of filler.
        depth: share of the filler before the number, 0 to 1; None draws it evenly.
        digits: digits of the number; the first is not 0.

    Raises:
        DataError: `length` has no room for the question without filler, or `depth` is not between 0 and 1.
    """
    key = str(rng.integers(10 ** (digits - 1), 10**digits))
    depth = float(rng.random()) if depth is None else depth
    if not 0 <= depth <= 1:
        raise DataError(f"the depth of a passkey must be between 0 and 1, got {depth}")

    def count(sentences: int) -> int:
        prompt, answer = _write(key, sentences, depth)
        return len(tokenizer(prompt + answer, verbose=False)["input_ids"])

    sentences = _largest_fit(count, length)
    prompt, answer = _write(key, sentences, depth)
    reached = round(depth * sentences) / sentences if sentences else 0.0
    return PasskeySample(prompt, answer, key, reached, count(sentences))


def passkey_samples(
    tokenizer: "PreTrainedTokenizerBase", length: int, *, seed: int, count: int, digits: int = DIGITS
) -> Iterator[PasskeySample]:
    """Draw `count` samples at depths spread evenly at random; sample i depends on `seed` and i alone."""
    for index in range(count):
        yield passkey_sample(np.random.default_rng([seed, index]), tokenizer, length, digits=digits)


def _write(key: str, sentences: int, depth: float) -> tuple[str, str]:
    before = round(depth * sentences)
    filler = [_FILLER[index % len(_FILLER)] for index in range(sentences)]
    parts = (_OPENING, " ".join(filler[:before]), _NEEDLE.format(key=key), " ".join(filler[before:]), _QUESTION)
    return "\n".join(part for part in parts if part), f" {key}"


def _largest_fit(count: Callable[[int], int], length: int) -> int:
    """The most sentences whose text has at most `length` tokens; they grow almost evenly, so few counts are needed."""
    bare, per_round = count(0), count(2 * len(_FILLER)) - count(len(_FILLER))
    if bare > length:
        raise DataError(f"a passkey question has {bare} tokens without filler; {length} are too few, give more")
    guess = max(0, (length - bare) * len(_FILLER) // max(1, per_round))
    while count(guess) > length:
        guess -= 1
    while count(guess + 1) <= length:
        guess += 1
    return guess
