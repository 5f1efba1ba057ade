"""Prompts by the copy of a model with fewer kernels: what they give, and when they are read as ever."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import lolcats
from decode_cases import SETTINGS, assert_close, eager, padded, read, with_stand_in
from lolcats.modeling import attention_mode
from lolcats.modeling.fused_prompts import FusedPrompts, prompts_of
from odd_modules import FickleRMSNorm

pytest.importorskip("triton")
Builder = Callable[..., Any]
Tokens = Callable[..., Tensor]

pytestmark = [
    pytest.mark.usefixtures("no_gradients", "fast_interpreter", "rounding"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs kernels on the CPU, interpreted"),
]


@pytest.fixture
def fused(make_student: Builder) -> Builder:
    """Students on the CPU that read prompts by fused kernels, which are interpreted."""

    def make(name: str = "kept", dtype: torch.dtype = torch.float32) -> Any:
        student = make_student(**SETTINGS[name]).to(dtype)
        with_stand_in(student).fuses = True
        return student

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("sliding", torch.float32), ("heads", torch.bfloat16)], ids=str)
def test_prompts_give_what_the_model_gives(fused: Builder, tokens: Tokens, name: str, dtype: torch.dtype) -> None:
    """In one piece and in two, padded and not; the same bits each time."""
    student, ids, close = fused(name, dtype), tokens(2, 14), 1e-5 if dtype == torch.float32 else 0.02
    for mask in (None, padded(ids)):

        def twice(mask: Tensor | None = mask) -> Tensor:
            cache = read(student, ids[:, :9], None if mask is None else mask[:, :9])
            return student(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits

        def whole(mask: Tensor | None = mask) -> Tensor:
            return student(ids, attention_mask=mask).logits

        for run in (whole, twice):
            got, want = [run(), run()], eager(student, run)
            assert torch.equal(*got)
            assert dtype == torch.bfloat16 or not torch.equal(got[0], want), "other kernels have another last digit"
            assert_close(got[0], want, close)
    assert prompts_of(student).read == 12


@pytest.mark.slow
def test_a_copy_is_made_once_and_again_where_modules_change(fused: Builder, tokens: Tokens) -> None:
    student, ids = fused(), tokens(1, 9)
    copies = []
    for _ in range(3):
        student(ids)
        copies.append(prompts_of(student).copy)
    assert copies[0] is not None and copies[0] is copies[1] is copies[2]
    student.model.norm = copy.deepcopy(student.model.norm)
    student.model.norm.weight.mul_(3)
    want = eager(student, lambda: student(ids).logits)
    assert_close(student(ids).logits, want, 1e-5)
    assert prompts_of(student).copy is not copies[0]
    student.model.norm.weight.mul_(0.5)  # in place: the copy has this very weight
    assert_close(student(ids).logits, want / 2, 1e-5)


def test_other_calls_are_the_models_own(fused: Builder, tokens: Tokens) -> None:
    student, ids = fused(), tokens(1, 9)
    prompts = prompts_of(student)
    assert len(student(ids, output_hidden_states=True).hidden_states) == 4
    student(ids, use_cache=False)
    student(inputs_embeds=student.get_input_embeddings()(ids))
    with torch.enable_grad():
        student(ids).logits.sum().backward()
    student.train()(ids)
    student.eval()
    with attention_mode(student, "softmax"):
        student(ids)
    with torch.autocast("cpu", torch.bfloat16):
        student(ids)
    lolcats.set_decode_graphs(student, False)
    student(ids)
    lolcats.set_decode_graphs(student, True)
    seen: list[Any] = []
    handle = student.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    student(ids)
    handle.remove()
    assert prompts.read == 0 and len(seen) == 1
    student(ids, past_key_values=DynamicCache(config=student.config), logits_to_keep=1)
    assert prompts.read == 1


def test_a_copy_that_is_wrong_is_not_used(fused: Builder, tokens: Tokens) -> None:
    student, ids = fused(), tokens(2, 9)
    student.model.norm = FickleRMSNorm(student.model.norm, 9)
    want = eager(student, lambda: student(ids).logits)
    with pytest.warns(UserWarning, match="prompts are read without fused kernels: the copy is off by"):
        assert torch.equal(student(ids).logits, want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert torch.equal(student(ids).logits, want)


def test_without_the_kernels(fused: Builder, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    student, ids = fused(), tokens(2, 9)
    assert torch.equal(student(ids).logits, eager(student, lambda: student(ids).logits))
    assert prompts_of(student).network is not None and prompts_of(student).read == 0


def test_models_are_copied_and_pickled_without_it(fused: Builder, tokens: Tokens) -> None:
    student = fused()
    student(tokens(1, 5))
    other = copy.deepcopy(student)
    assert isinstance(prompts_of(other), FusedPrompts) and prompts_of(other).copy is None
    assert isinstance(prompts_of(student).copy, nn.Module)
