"""The text that hides a needle: sentences, as many as fit, with the needles between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import cycle, islice

from transformers import PreTrainedTokenizerBase

from lolcats.data.sources import iter_records
from lolcats.data.templates import render
from lolcats.errors import DataError

NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
"""The filler of Mohtashami and Jaggi (2023), which RULER repeats too."""
_PROSE = re.compile(r"[A-Z][^\n|<>{}=*_]*[.!?]")
_WORDS = range(5, 61)
_GROWTH = 8  # sentences between two counts of tokens that tell how long a sentence is


@lru_cache(maxsize=4)
def essay(source: str) -> tuple[str, ...]:
    """Sentences of prose in a source of `iter_records`, in order; tables, code and headings are left out.

    Raises:
        DataError: the source cannot be read, or has no sentence of 5 to 60 words.
    """
    found: list[str] = []
    for record in iter_records(source):
        for paragraph in re.split(r"\n\s*\n", "".join(render(record, "plain", None))):  # type: ignore[arg-type]
            sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split()))
            found += [s for s in sentences if _PROSE.fullmatch(s) and len(s.split()) in _WORDS]
    if not found:
        raise DataError(f"source {source!r} has no sentences of 5 to 60 words to hide a needle in; give prose")
    return tuple(found)


def hide(sentences: Sequence[str], count: int, needles: Sequence[str], depths: Sequence[float]) -> str:
    """`count` sentences, the list repeated where it is too short, and each needle after its share of them.

    Args:
        sentences: the haystack.
        count: how many of its sentences.
        needles, depths: needle i stands after round(depths[i] * count) sentences.
    """
    hay = list(islice(cycle(sentences), count))
    places = [(round(depth * count), number) for number, depth in enumerate(depths)]
    for place, number in sorted(places, reverse=True):  # from the end, so that earlier places stay what they are
        hay.insert(place, needles[number])
    return " ".join(hay)


def fit(write: Callable[[int], str], tokenizer: PreTrainedTokenizerBase, room: int, least: int = 0) -> tuple[str, int]:
    """The longest text of `write(sentences)` that has at most `room` tokens, and its number of sentences.

    Args:
        write: the text with so many sentences of filler; more sentences make it longer.
        tokenizer: counts, with the special tokens that it adds itself.
        room: tokens.
        least: sentences that the text must have.

    Raises:
        DataError: the text with the least filler is longer than `room`.
    """

    def count(sentences: int) -> int:
        return len(encode(tokenizer, write(sentences)))

    bare = count(least)
    if bare > room:
        raise DataError(f"the prompt has {bare} tokens with the least filler, and {room} are too few, give more")
    low, step = least, max(1, (room - bare) * _GROWTH // max(1, count(least + _GROWTH) - bare))
    high = low + step
    while count(high) <= room:
        low, high = high, high + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= room else (low, middle)
    return write(low), low


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt, with the begin token where the tokenizer adds one."""
    return list(tokenizer(text, verbose=False)["input_ids"])  # type: ignore[arg-type]
