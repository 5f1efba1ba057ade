"""Text out of a converted model: `generate` must say what the full forward pass says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lolcats.models.generation import sample

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]

LAYERS = [
    pytest.param({"window": 6, "fold": 4}, id="sliding"),
    pytest.param({"window": 4, "sinks": 2, "window_kind": "terraced"}, id="terraced"),
    pytest.param({"window": 6, "sinks": 2, "decay": "gate", "state_heads": "kv", "fold": 3}, id="gate-kv"),
    pytest.param({"window": 6, "layers": [0, 2]}, id="mixed"),
]


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, **({"do_sample": False, "max_new_tokens": 15} | options))


@pytest.mark.parametrize("length", [1, 5, 12])
@pytest.mark.parametrize("settings", LAYERS)
def test_greedy_text_is_the_argmax_of_the_full_pass(
    make_student: Students, tokens: Tokens, settings: dict[str, Any], length: int
) -> None:
    student = make_student(**settings)
    text = generate(student, tokens(2, length))
    with torch.no_grad():
        best = student(text).logits.argmax(-1)
    assert torch.equal(text[:, length:], best[:, length - 1 : -1])


@pytest.mark.slow
@pytest.mark.parametrize("settings", LAYERS)
def test_left_padded_prompts_are_as_single_ones(
    make_student: Students, tokens: Tokens, settings: dict[str, Any]
) -> None:
    student, ids = make_student(**settings), tokens(3, 12)
    lengths = [12, 3, 9]
    batch = ids.clone()
    for row, n in enumerate(lengths):
        batch[row, : 12 - n] = 0
    together = generate(student, batch, attention_mask=(batch > 0).long())
    for row, n in enumerate(lengths):
        assert torch.equal(together[row : row + 1, 12 - n :], generate(student, ids[row : row + 1, 12 - n :]))


@pytest.mark.slow
def test_without_a_cache_generate_says_the_same(make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=6, sinks=2)
    assert torch.equal(generate(student, tokens()), generate(student, tokens(), use_cache=False))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [LAYERS[0], LAYERS[3]])
def test_beam_search_finds_the_same_beams_as_without_a_cache(
    make_student: Students, tokens: Tokens, settings: dict[str, Any]
) -> None:
    student, options = make_student(**settings), {"num_beams": 4, "num_return_sequences": 2}
    with_cache = generate(student, tokens(2, 9), **options)
    assert with_cache.shape == (4, 24)
    assert torch.equal(with_cache, generate(student, tokens(2, 9), use_cache=False, **options))


@pytest.mark.slow
def test_sampling_depends_only_on_the_seed(make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=6)

    def draw(seed: int, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        return generate(student, tokens(1, 8), do_sample=True, num_return_sequences=3, **options)

    first = draw(1)
    assert torch.equal(first, draw(1))
    assert torch.equal(first, draw(1, use_cache=False))
    assert not torch.equal(first, draw(2))
    assert not torch.equal(first[0], first[1])


@pytest.mark.slow
def test_prefill_in_chunks(make_student: Students, tokens: Tokens) -> None:
    student, ids = make_student(window=6, sinks=2), tokens(2, 17)
    assert torch.equal(generate(student, ids, prefill_chunk_size=5), generate(student, ids))


@pytest.mark.slow
def test_prefill_in_chunks_of_padding(make_student: Students, tokens: Tokens) -> None:
    student, ids = make_student(window=6, sinks=2), tokens(2, 17)
    ids[0, :11] = 0
    chunked = generate(student, ids, attention_mask=(ids > 0).long(), prefill_chunk_size=4)
    assert torch.equal(chunked[:1, 11:], generate(student, ids[:1, 11:]))
    assert torch.equal(chunked[1:], generate(student, ids[1:]))


@pytest.mark.parametrize(
    "settings", [{"window": 6}, {"window": 6, "layers": [0, 2]}, {"window": 6, "layers": [1]}], ids=str
)
def test_static_cache_says_the_same_or_is_refused_in_words(
    make_student: Students, tokens: Tokens, settings: dict[str, Any]
) -> None:
    student, ids = make_student(**settings), tokens(2, 9)
    ids[0, :4] = 0
    options = {"attention_mask": (ids > 0).long()}
    expected = generate(student, ids, **options)
    try:
        text = generate(student, ids, cache_implementation="static", disable_compile=True, **options)
    except ValueError as error:
        assert "static" in str(error).lower()
    else:
        assert torch.equal(text, expected)


@pytest.mark.slow
def test_a_finished_row_does_not_disturb_the_others(make_student: Students, tokens: Tokens) -> None:
    student, ids = make_student(window=6), tokens(2, 9)
    first, alone = generate(student, ids[:1]), generate(student, ids[1:])
    stop = next(t for t in first[0, 9:].tolist() if t not in alone[0, 9:].tolist())
    end = 9 + first[0, 9:].tolist().index(stop)
    together = generate(student, ids, eos_token_id=stop, pad_token_id=0)
    assert torch.equal(together[0, : end + 1], first[0, : end + 1])
    assert together[0, end + 1 :].eq(0).all()
    assert torch.equal(together[1:], alone)


def test_continuing_from_a_returned_cache(make_student: Students, tokens: Tokens) -> None:
    student: Any = make_student(window=6)
    ids = tokens(1, 9)
    first = generate(student, ids, return_dict_in_generate=True, max_new_tokens=6)  # type: ignore[assignment]
    more = generate(student, first.sequences, past_key_values=first.past_key_values, max_new_tokens=5)  # type: ignore[attr-defined]
    assert torch.equal(more, generate(student, ids, max_new_tokens=11))


def test_sample_returns_only_the_continuation(
    make_teacher: Callable[..., LlamaForCausalLM], make_student: Students, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    student = make_student(make_teacher(vocab_size=len(tiny_tokenizer)), window=4)
    prompt = "The river runs"
    text = sample(student, tiny_tokenizer, prompt, max_new_tokens=7)
    ids = tiny_tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = generate(student, ids, max_new_tokens=7)[0, ids.shape[1] :]
    assert text == tiny_tokenizer.decode(expected, skip_special_tokens=True)
