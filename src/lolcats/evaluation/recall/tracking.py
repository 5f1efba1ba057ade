"""Variable tracking after RULER (arXiv 2404.06654): which names hold a value, through a chain of assignments."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from lolcats.evaluation.recall.haystack import NOISE, fit, hide
from lolcats.evaluation.recall.needles import Prompt

HOPS = 4
"""Assignments of one variable to the next: a chain has one name more."""
_EXAMPLE_SENTENCES = 10


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
    names, value = _names(rng, hops + 1, letters=5), _value(rng)
    other, known = _names(rng, hops + 1, letters=3), _value(rng)
    example = "\n".join(_write(other, known, _EXAMPLE_SENTENCES, _depths(rng, len(other))))
    depths = _depths(rng, len(names))

    def write(sentences: int) -> tuple[str, str]:
        text, question = _write(names, value, sentences, depths)
        return f"{example} {', '.join(other)}\n\n{text}", question

    ids, sentences = fit(write, NOISE, tokenizer, room, least=len(names))
    return Prompt(ids, tuple(names), tuple(round(d * sentences) / sentences for d in depths))


def _write(names: Sequence[str], value: str, sentences: int, depths: Sequence[float]) -> tuple[str, str]:
    """What stands before the question, and the question."""
    sources = [value, *(f"VAR {name}" for name in names)]
    chain = [f"VAR {name} = {source}." for name, source in zip(names, sources, strict=False)]
    opening = "Follow the variables that are assigned in this text; their assignments are hidden in it."
    question = f"Question: Find all variables that hold the value {value} in the text above."
    answer = f"Answer: {len(names)} variables in the text above hold the value {value}, they are:"
    return f"{opening}\n{hide(NOISE, sentences, chain, depths)}", f"{question} {answer}"


def _depths(rng: np.random.Generator, count: int) -> list[float]:
    return sorted(float(depth) for depth in rng.random(count))


def _value(rng: np.random.Generator) -> str:
    return str(rng.integers(10_000, 100_000))


def _names(rng: np.random.Generator, count: int, letters: int) -> list[str]:
    """Different names, none part of another."""
    alphabet = list(string.ascii_uppercase)
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice(alphabet, letters))] = None
    return list(names)
