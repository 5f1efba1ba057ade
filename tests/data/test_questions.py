"""Facts and questions among running text: where they are, how far apart, and that nothing measured is trained on."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lolcats.data import passkey, questions
from lolcats.data.questions import Questioned, ask
from lolcats.errors import DataError
from lolcats.evaluation.recall import needles

SAMPLE = [
    form.format(name=f"{first} {second}", value=value)
    for kind in questions._KINDS
    for forms in kind
    for form in forms
    for first, second, value in (("grey", "mill", "40713"), ("windy", "inn", "river"))
]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Spaces are letters that words begin with, no digit is split off, and merges cross words and full stops."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    made.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<end>"], show_progress=False,
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["\n"],
    )  # fmt: skip
    made.train_from_iterator(SAMPLE * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unk>")


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    """See `sentencepiece_like`."""
    return sentencepiece_like()


def make(tokenizer, seed: int = 0, length: int = 900, gap: int = 100) -> Questioned:
    text = np.resize(tokenizer("the cat sat on the mat. ", add_special_tokens=False)["input_ids"], length)
    return ask(np.random.default_rng(seed), tokenizer, text, length, gap)


def spans(found: Questioned) -> list[tuple[int, int]]:
    """First token and end of each answer, which is in one piece."""
    places = [np.flatnonzero(found.answers == number) for number in range(1, found.answers.max() + 1)]
    assert all((np.diff(place) == 1).all() for place in places)
    return [(int(place[0]), int(place[-1]) + 1) for place in places]


@pytest.mark.parametrize("name", ["tokenizer", "begin_tokenizer", "pieces"])
def test_answers_are_where_the_mask_says(name, request):
    """An answer is the value that the fact of the same name has, and no other fact."""
    tokenizer = request.getfixturevalue(name)
    found = make(tokenizer, length=1500, gap=1500)
    text = tokenizer.decode(found.ids)
    assert len(found.gaps) >= 3
    for first, end in spans(found):
        answer = tokenizer.decode(found.ids[first:end])
        (value,) = re.findall(r"[a-z]+|\d+", answer)
        assert value in questions._VALUES or 4 <= len(value) <= 7
        assert len(re.findall(rf"(?<!\w){value}(?!\w)", text)) >= 2
        without = tokenizer.decode(found.ids[:first]) + tokenizer.decode(found.ids[end:])
        assert len(re.findall(rf"(?<!\w){value}(?!\w)", without)) == len(re.findall(rf"(?<!\w){value}(?!\w)", text)) - 1


def test_tokens_across_the_border_of_an_answer_are_of_it():
    """A tokenizer that merges the digits with what is around them."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    inner.train_from_iterator(SAMPLE * 50, trainers.BpeTrainer(vocab_size=4000, show_progress=False,
                              initial_alphabet=[chr(code) for code in range(33, 127)] + ["\n"]))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    found = make(tokenizer, gap=900)
    for first, end in spans(found):
        answer = "".join(tokenizer.convert_ids_to_tokens(found.ids[first:end].tolist()))
        assert re.search(r"\d{4,7}|" + "|".join(questions._VALUES), answer)


@pytest.mark.slow
@pytest.mark.parametrize("gap", [0, 1, 60])
def test_questions_come_within_the_gap(tokenizer, gap):
    gaps = np.concatenate([make(tokenizer, seed, gap=gap).gaps for seed in range(30)])
    assert gaps.min() == 0 and gaps.max() == gap
    assert abs(gaps.mean() - gap / 2) <= 5 * gap / np.sqrt(12 * len(gaps))


def test_gaps_are_the_tokens_between_fact_and_question(tokenizer):
    """Of a pair alone, found again as what is not text."""
    seen = 0
    for seed in range(8):
        found = ask(np.random.default_rng(seed), tokenizer, np.full(150, -7), 150, 20)
        assert len(spans(found)) == 1
        other = np.flatnonzero(found.ids != -7)
        holes = np.diff(other) - 1
        assert holes[holes > 0].tolist() == [gap for gap in found.gaps.tolist() if gap]
        seen += int((holes > 0).sum())
    assert seen > 4


def test_a_gap_beyond_the_sequence_is_what_there_is_room_for(tokenizer):
    found = make(tokenizer, length=400, gap=10**6)
    assert 0 <= found.gaps.min() <= found.gaps.max() < 400


def test_half_of_the_tokens_are_text_that_goes_on(tokenizer):
    text = np.arange(2000) + 10**6
    found = ask(np.random.default_rng(0), tokenizer, text, 1500, 300)
    kept = found.ids[found.ids >= 10**6]
    assert kept.tolist() == text[: len(kept)].tolist()
    assert 0.4 < len(kept) / 1500 < 0.6


def test_the_same_seed_gives_the_same_sequence(tokenizer):
    one, two, other = make(tokenizer, 1), make(tokenizer, 1), make(tokenizer, 2)
    assert np.array_equal(one.ids, two.ids) and np.array_equal(one.answers, two.answers)
    assert not np.array_equal(one.ids, other.ids)


def test_names_are_of_one_fact_each(tokenizer):
    """Else a question would have two answers."""
    text = tokenizer.decode(make(tokenizer, length=3000, gap=3000).ids)
    names = re.findall(rf"({'|'.join(questions._FIRST)}) ({'|'.join(questions._SECOND)})", text)
    assert len(names) >= 12 and {names.count(name) for name in names} == {2}


def test_no_room_is_an_error(tokenizer):
    with pytest.raises(DataError, match=r"sequences of 20 tokens have no room .* raise data\.sequence_length"):
        make(tokenizer, length=20)


def test_nothing_that_is_measured_is_trained_on():
    """Neither sentences, in parts of four words, nor words of names."""
    measured = [passkey._OPENING, passkey._NEEDLE, passkey._QUESTION, *passkey._FILLER]
    measured += ["One of the special magic numbers for is", *needles._frame("numbers", ["x"])]
    trained = [form for kind in questions._KINDS for forms in kind for form in forms]
    assert not fours(measured) & fours(trained)
    words = {*questions._FIRST, *questions._SECOND, *questions._VALUES}
    assert not words & {*needles.ADJECTIVES, *needles.NOUNS}
    for listed in (questions._FIRST, questions._SECOND, questions._VALUES):
        assert len(listed) == len(set(listed)) > 50


def fours(texts: list[str]) -> set[tuple[str, ...]]:
    """Every four words that stand together in a sentence."""
    found = set()
    for text in texts:
        words = re.findall(r"[a-z]+|\{\w+\}|[.?]", text.lower())
        found |= {tuple(words[i : i + 4]) for i in range(len(words) - 3)}
    return found
