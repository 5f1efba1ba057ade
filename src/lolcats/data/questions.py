"""Sequences that state facts and ask for them among running text: many facts, many questions (arXiv 2609.16183).

A few facts among many distractors never start to be learned; many questions at short distances do, and the distance
can then grow. No sentence here is one of `lolcats.data.passkey` or `lolcats.evaluation.recall`, and no name is made of
their words: what is measured with those must not be trained on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lolcats.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OFF = "set transfer.recall.share=0 and finetune.recall.share=0"
_FACTS = 0.5  # of a sequence's tokens are facts and questions
_TOKENS = 24  # no fact with its question has fewer, so that there are enough of them
_TRIES = 30
_WORDS = 0.25  # of the values are words
_DIGITS = (4, 7)

_FIRST_TEXT = """
alpine ancient autumn barren blue cloudy coastal crimson distant eastern empty florid foggy grand grey green heavy
indigo inner ivory late leafy long lower marshy misty mossy northern outer pale pink plain purple rainy red rocky
sandy scarlet shaded silver snowy southern stony stormy sunken tall teal upper violet western white windy winter yellow
"""
_SECOND_TEXT = """
abbey arcade attic bakery balcony bank barn bay boathouse brewery chapel cliff clinic college corner cottage court
dairy dock embassy factory farm forge fort foundry gallery garage gate grove hall harvest hostel inn junction
kiosk laboratory library lodge market mill mine monastery museum nursery office orchard palace parlour pavilion pier
plaza quarry quay ranch refuge school shed station studio tavern temple theatre tower vault villa village wharf
"""
_VALUES_TEXT = """
apple bread butter cactus camel cloud coffee cotton donkey eagle elephant flame flute garlic giraffe
ginger goat granite guitar honey horse iron jasmine kitten lavender lion maple melon mountain mustard olive onion
orange otter owl panther peach pearl piano plum potato pumpkin raven rice river rose saffron sugar thunder tiger tomato
trout vinegar whale wheat wool zebra
"""
_FIRST, _SECOND, _VALUES = _FIRST_TEXT.split(), _SECOND_TEXT.split(), _VALUES_TEXT.split()

# Of each kind: how a fact is stated, and how it is asked for.
_KINDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("The pass key of the {name} is {value}.", "Whoever guards the {name} wants {value} as its pass key."),
        ("Which pass key has the {name}? It has {value}.", "The {name} has the pass key {value}, as was said."),
    ),
    (
        ("To open the {name}, dial {value}.", "The lock on the {name} turns at {value}."),
        ("What has to be dialled at the {name}? {value}.", "So the {name} opens with {value}."),
    ),
    (
        ("In the register the {name} stands under {value}.", "{value} is how the register lists the {name}."),
        ("Under what does the register list the {name}? Under {value}.", "Register entry of the {name}: {value}."),
    ),
    (
        ("Letters to the {name} carry the mark {value}.", "A letter marked {value} goes to the {name}."),
        ("Q: How are letters to the {name} marked? A: {value}.", "For the {name}, one writes {value} on the letter."),
    ),
    (
        ("The agent at the {name} answers to {value}.", "Ask for {value} when you reach the {name}."),
        ("Whom does one ask for at the {name}? {value}.", "At the {name} the agent still answers to {value}."),
    ),
)
_ENDS = (" ", "\n")


class Questioned(NamedTuple):
    """A sequence of L tokens."""

    ids: np.ndarray
    """int32 [L]."""
    answers: np.ndarray
    """int32 [L]: 1, 2, ... at the tokens of the first, second, ... answer, 0 elsewhere."""
    gaps: np.ndarray
    """int64 [answers], tokens between the end of the fact and the beginning of its question."""


class _Pair(NamedTuple):
    """A fact and its question, tokenised."""

    fact: np.ndarray
    question: np.ndarray
    answer: np.ndarray
    """bool [tokens of the question]."""

    @property
    def tokens(self) -> int:
        return len(self.fact) + len(self.question)


def ask(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase, text: np.ndarray, length: int, gap: int
) -> Questioned:
    """Lay facts and their questions into running text.

    Args:
        rng: all that is drawn; the same state gives the same sequence.
        tokenizer: of the text; a fast one, which tells where each token begins.
        text: [at least `length`] tokens, which go on after each fact and question.
        length: L.
        gap: most tokens between a fact and its question, drawn evenly from 0 to it, or to what there is room for.

    Raises:
        DataError: a slow tokenizer, or no room for a fact and its question.
    """
    pairs = _pairs(rng, tokenizer, max(1, length // _TOKENS))
    out, answers = np.zeros(length, np.int32), np.zeros(length, np.int32)
    taken = np.zeros(length, bool)
    gaps: list[int] = []
    for pair in pairs:
        places = _place(rng, taken, pair, gap)
        if places is None:
            continue
        gaps.append(places[1] - places[0] - len(pair.fact))
        for start, tokens in zip(places, (pair.fact, pair.question), strict=True):
            out[start : start + len(tokens)] = tokens
            taken[start : start + len(tokens)] = True
        answers[places[1] : places[1] + len(pair.question)][pair.answer] = len(gaps)
        if taken.sum() >= _FACTS * length:
            break
    if not gaps:
        need = min(pair.tokens for pair in pairs)
        raise DataError(f"sequences of {length} tokens have no room for a fact and its question, which take {need} and "
                        f"more; raise data.sequence_length, or {_OFF}")  # fmt: skip
    out[~taken] = text[: length - taken.sum()]
    return Questioned(out, answers, np.array(gaps))


def _place(rng: np.random.Generator, taken: np.ndarray, pair: _Pair, gap: int) -> tuple[int, int] | None:
    """Where a fact and its question begin, both in free places; None where no try finds one."""
    room = len(taken) - pair.tokens
    if room < 0:
        return None
    between = int(rng.integers(min(gap, room) + 1))
    for _ in range(_TRIES):
        fact = int(rng.integers(room - between + 1))
        question = fact + len(pair.fact) + between
        if not taken[fact : fact + len(pair.fact)].any() and not taken[question : question + len(pair.question)].any():
            return fact, question
    return None


def _pairs(rng: np.random.Generator, tokenizer: PreTrainedTokenizerBase, count: int) -> list[_Pair]:
    """Facts of different names, with their questions."""
    if not tokenizer.is_fast:
        raise DataError(f"recall needs a fast tokenizer, which tells where each token begins; {_OFF}")
    count = min(count, len(_FIRST) * len(_SECOND))
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    for number in rng.choice(len(_FIRST) * len(_SECOND), size=count, replace=False).tolist():
        name = f"{_FIRST[number % len(_FIRST)]} {_SECOND[number // len(_FIRST)]}"
        value, kind = _value(rng), _KINDS[rng.integers(len(_KINDS))]
        end = _ENDS[rng.integers(len(_ENDS))]
        for forms in kind:
            before, after = forms[rng.integers(len(forms))].replace("{name}", name).split("{value}")
            texts.append(f"{end}{before}{value}{after}{end.strip(' ')}")
            start = len(end) + len(before)
            spans.append((start, start + len(value)))
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True)
    ids = [np.array(tokens, np.int32) for tokens in encoded["input_ids"]]
    marks = [
        np.array([begin < last and end > first for begin, end in offsets], bool)
        for offsets, (first, last) in zip(encoded["offset_mapping"], spans, strict=True)
    ]
    return [_Pair(*some) for some in zip(ids[::2], ids[1::2], marks[1::2], strict=True)]


def _value(rng: np.random.Generator) -> str:
    if rng.random() < _WORDS:
        return _VALUES[rng.integers(len(_VALUES))]
    digits = int(rng.integers(_DIGITS[0], _DIGITS[1] + 1))
    return str(rng.integers(10 ** (digits - 1), 10**digits))
