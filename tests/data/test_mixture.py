"""Several sources in one training set."""

import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lolcats.config import DataConfig, load_config
from lolcats.data import build_datasets
from lolcats.data.packing import _first_fit
from lolcats.errors import DataError


@pytest.fixture
def texts(write_lines) -> dict[str, str]:
    """Four sources; each document repeats the letter of its source, 10 tokens with its end."""
    sizes = {"a": 300, "b": 100, "c": 60, "d": 60}
    return {c: str(write_lines(f"{c}.jsonl", [{"text": c.upper() * 9}] * n)) for c, n in sizes.items()}


def settings(sources: list[Any], **changes: Any) -> DataConfig:
    return DataConfig(**{"sources": sources, "sequence_length": 10, "validation_sequences": 4, **changes})


def shares(part, tokenizer) -> dict[str, int]:
    """Documents of each source; the letters survive tokenisation one by one."""
    text = tokenizer.decode(part.ids.ravel())
    return {c: round(text.count(c.upper()) / 9) for c in "abcd" if c.upper() in text}


def test_without_weights_everything_is_read_once(texts, tokenizer):
    train, validation = build_datasets(settings([texts["a"], texts["b"]]), tokenizer, seed=0)
    whole = shares(train, tokenizer)
    held = shares(validation, tokenizer)
    assert {c: whole[c] + held.get(c, 0) for c in "ab"} == {"a": 300, "b": 100}


@pytest.mark.parametrize(("weights", "expected"), [((1, 1), (100, 100)), ((2, 1), (200, 100)), ((30, 1), (300, 10))])
def test_weights_are_shares_of_the_tokens(weights, expected, texts, tokenizer):
    sources = [{"name": texts[c], "weight": w} for c, w in zip("ab", weights, strict=True)]
    output = io.StringIO()
    train, validation = build_datasets(settings(sources), tokenizer, seed=0, console=Console(file=output, width=500))
    counts = shares(train, tokenizer)
    held = shares(validation, tokenizer)
    assert tuple(counts[c] + held.get(c, 0) for c in "ab") == expected
    assert f"{expected[0] * 10:,} of 3,000 tokens" in output.getvalue()
    assert "tokens/s" in output.getvalue()


def test_a_cap_keeps_the_shares(texts, tokenizer):
    sources = [{"name": texts["a"], "weight": 3.0}, texts["b"]]
    train, validation = build_datasets(settings(sources, max_tokens=400), tokenizer, seed=0)
    held, counts = shares(validation, tokenizer), shares(train, tokenizer)
    assert {c: counts[c] + held.get(c, 0) for c in "ab"} == {"a": 30, "b": 10}


def test_order_depends_on_the_seed_alone(texts, tokenizer):
    config = settings([{"name": texts["a"], "weight": 1}, {"name": texts["b"], "weight": 1}])
    once, again, other = (build_datasets(config, tokenizer, seed)[0].ids for seed in (1, 1, 2))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)


def test_rules_hold_out_their_records_and_others_their_share(texts, tokenizer):
    sources = [{"name": texts["a"], "validation": 7}, {"name": texts["c"], "validation": 0}, texts["b"], texts["d"]]
    train, validation = build_datasets(settings(sources, validation_sequences=50), tokenizer, seed=0)
    held, counts = shares(validation, tokenizer), shares(train, tokenizer)
    assert held["a"] == 7
    assert "c" not in held
    assert held["b"] + held["d"] == pytest.approx(50 * 160 / 513, abs=1)
    assert sum(held.values()) + sum(counts.values()) == 520


def test_a_mixture_as_an_override(texts):
    text = f"data.sources=[{{name: {texts['a']}, weight: 2}}, {texts['b']}]"
    config = load_config(None, [text])
    assert config.data.source_names == [texts["a"], texts["b"]]


def test_passkeys_are_made_here(tokenizer):
    config = DataConfig(sources=[{"name": "passkey", "limit": 40}], sequence_length=600, packing="documents")  # type: ignore[list-item]
    train, validation = build_datasets(config.model_copy(update={"validation_sequences": 4}), tokenizer, seed=3)
    assert (len(train), len(validation)) == (35, 4)  # documents are a little shorter: a fifth one is held out
    for row, mask in zip(train.ids, train.loss_mask, strict=True):
        text, answer = tokenizer.decode(row), tokenizer.decode(row[mask])
        key = text.split("The pass key is ")[1][:5]
        assert key.isdigit()
        assert answer.startswith(f" {key}<end>")
    assert (train.document >= 0).mean() > 0.95


def test_text_of_the_teacher_needs_one(tokenizer):
    with pytest.raises(DataError, match="written by the teacher of a run"):
        build_datasets(DataConfig(sources=["self"]), tokenizer, seed=0)


def test_first_fit_is_the_first_that_fits():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 101, 3000)
    free: list[int] = []
    expected = []
    for need in tokens:
        row = next((i for i, left in enumerate(free) if left >= need), len(free))
        if row == len(free):
            free.append(100)
        free[row] -= need
        expected.append(row)
    assert _first_fit(tokens, 100).tolist() == expected
