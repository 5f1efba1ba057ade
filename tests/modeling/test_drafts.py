"""Text that is written with the help of drafts (speculative decoding, prompt lookup) is that without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from decode_cases import SETTINGS, assert_close, with_stand_in
from lolcats import LolcatsError, attention_mode
from lolcats.modeling.decode_graphs import graphs_of
from lolcats.modeling.taking_back import HELD

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("no_gradients")

LAYERS: dict[str, dict[str, Any]] = SETTINGS | {
    "mixed": {"window": 4, "layers": [0, 2], "fold": 3},
    "mixed-heads": {"mixer": "blend", "sinks": 1, "split": [[[2, 0], [5, 3]]], "bits": 8, "layers": [1]},
}
NEW = 10


def assert_unchanged(student: Any, ids: Tensor, **options: Any) -> int:
    """Greedy text with drafts is that without; the number of calls of the model."""
    calls: list[Any] = []
    want = student.generate(ids, do_sample=False, max_new_tokens=NEW)
    hook = student.register_forward_pre_hook(lambda *args: calls.append(args))
    got = student.generate(ids, do_sample=False, max_new_tokens=NEW, **options)
    hook.remove()
    assert torch.equal(got, want)
    return len(calls)


@pytest.mark.parametrize("length", [5, pytest.param(HELD + 11, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["sliding", "terraced", "kept", "heads", "recalled", "mixed", "mixed-heads"])
def test_the_text_is_the_same(
    make_student: Students, teacher: LlamaForCausalLM, tokens: Tokens, name: str, length: int
) -> None:
    student, ids = make_student(**LAYERS[name]), tokens(1, length)
    assert_unchanged(student, ids, assistant_model=teacher)
    assert_unchanged(student, ids.repeat(1, 2), prompt_lookup_num_tokens=5)


@pytest.mark.parametrize("name", ["sliding", "mixed", pytest.param("heads", marks=pytest.mark.slow)])
def test_a_student_drafts(make_student: Students, teacher: LlamaForCausalLM, tokens: Tokens, name: str) -> None:
    student, drafts = make_student(**LAYERS[name]), make_student(**LAYERS[name])
    for length in (1, HELD + 11):
        ids = tokens(1, length)
        assert assert_unchanged(student, ids, assistant_model=drafts) < NEW
        assert_unchanged(teacher, ids, assistant_model=student)


@pytest.mark.parametrize("name", ["sliding", "mixed"])
def test_its_first_layers_draft(make_student: Students, tokens: Tokens, name: str) -> None:
    student = make_student(**LAYERS[name])
    for layers in (1, 2):
        assert_unchanged(student, tokens(1, 9), assistant_early_exit=layers)


@pytest.mark.slow
def test_drafts_by_graphs(make_student: Students, tokens: Tokens) -> None:
    student, drafts = (make_student(**SETTINGS["heads"]) for _ in range(2))
    with_stand_in(student)
    with_stand_in(drafts)
    drafts.generation_config.assistant_confidence_threshold = 0  # else a doubtful draft has one token
    for options in ({"assistant_model": drafts}, {"prompt_lookup_num_tokens": 3}):
        assert_unchanged(student, tokens(1, 9).repeat(1, 3), **options)
    assert graphs_of(drafts).replays >= 3


def test_a_text_that_repeats_takes_fewer_calls(make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=4)
    with attention_mode(student, "no_attention"):  # each token depends on the one before: text goes round in circles
        text = student.generate(tokens(1, 6), do_sample=False, max_new_tokens=60)
        assert assert_unchanged(student, text, prompt_lookup_num_tokens=5) <= 4


@pytest.mark.parametrize("drafted", [False, True])
def test_sampling_with_drafts(make_student: Students, tokens: Tokens, drafted: bool) -> None:
    student, ids = make_student(**LAYERS["heads"]), tokens(1, 6).repeat(1, 4)
    options = {"assistant_model": make_student(**LAYERS["heads"])} if drafted else {"prompt_lookup_num_tokens": 4}
    torch.manual_seed(0)
    out = student.generate(ids, do_sample=True, max_new_tokens=NEW, return_dict_in_generate=True, **options)
    assert out.sequences.shape == (1, 24 + NEW)
    left = out.past_key_values  # all but the last token are in it
    got = student(out.sequences[:, left.get_seq_length() :], past_key_values=left).logits[:, -1]
    assert_close(got, student(out.sequences).logits[:, -1], 1e-5)


def test_what_transformers_would_do_wrongly_is_refused(make_student: Students, tokens: Tokens) -> None:
    student, ids = make_student(window=4), tokens(1, 30)
    cache = DynamicCache(config=student.config)
    student(ids[:, :20], past_key_values=cache)
    with pytest.raises(LolcatsError, match=r"\(20 tokens here\); leave out past_key_values"):
        student.generate(ids, past_key_values=cache, max_new_tokens=4, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="Static cache"):
        student.generate(
            ids, max_new_tokens=4, prompt_lookup_num_tokens=3, cache_implementation="static", disable_compile=True
        )


def test_layers_for_several_tokens_are_refused_at_once(make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=4)
    calls: list[Any] = []
    student.register_forward_pre_hook(lambda *args: calls.append(args))
    with pytest.raises(LolcatsError, match="use_mtp"):
        student.generate(tokens(1), max_new_tokens=4, use_mtp=True)
    assert not calls
