"""The text that hides a needle: sentences, as many as fit, with the needles between them."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import cycle, islice

from transformers import PreTrainedTokenizerBase

from lolcats.data.sources import iter_placed
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
    for record, where in iter_placed(source):
        try:
            text = "".join(render(record, "plain", None))  # type: ignore[arg-type]
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        for paragraph in re.split(r"\n\s*\n", text):
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


def fit(
    write: Callable[[int], tuple[str, str]],
    hay: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    least: int = 1,
) -> tuple[list[int], int]:
    """A prompt of `room` tokens, and how many whole sentences of hay are in it.

    The last sentence is cut to the token, so that prompts of equal length need no padding. (Slow tokenizers do not tell
    where a token begins; with them a prompt may lack a sentence.)

    Args:
        write: what stands before the question and the question, with so many sentences of hay.
        hay: the sentences, of which the one that is cut is taken.
        tokenizer: counts, with the special tokens that it adds itself.
        room: tokens.
        least: sentences that there must be.

    Raises:
        DataError: the prompt with the least hay is longer than `room`.
    """

    def count(sentences: int) -> int:
        return len(encode(tokenizer, "\n".join(write(sentences))))

    bare = count(least)
    if bare > room:
        raise DataError(f"the prompt has {bare} tokens with the least filler, and {room} are too few, give more")
    low, step = least, max(1, (room - bare) * _GROWTH // max(1, count(least + _GROWTH) - bare))
    high = low + step
    while count(high) <= room:
        low, high = high, high + step
    low += bisect_right(range(low + 1, high), room, key=count)
    before, question = write(low)
    return _fill(before, hay[low % len(hay)], question, tokenizer, room), low


def _fill(before: str, sentence: str, question: str, tokenizer: PreTrainedTokenizerBase, room: int) -> list[int]:
    """Tokens of before + as much of the sentence as fits + question."""
    ids = encode(tokenizer, f"{before}\n{question}")
    if not tokenizer.is_fast or len(ids) == room:
        return ids
    full = tokenizer(f"{before} {sentence}\n{question}", verbose=False)
    start, end = (full.char_to_token(place) for place in (len(before) + 1, len(before) + 1 + len(sentence)))
    excess = len(full["input_ids"]) - room
    if start is None or end is None or not 0 <= excess <= end - start:
        return ids
    return [*full["input_ids"][: end - excess], *full["input_ids"][end:]]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt, with the begin token where the tokenizer adds one."""
    return list(tokenizer(text, verbose=False)["input_ids"])  # type: ignore[arg-type]
