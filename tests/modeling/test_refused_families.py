"""Layers and models that are left as they are, or refused with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, T5Config, T5ForConditionalGeneration

from lolcats import LolcatsError
from lolcats.config import LinearizationConfig
from lolcats.modeling import convert, linearized_layers

Builder = Callable[..., Any]
Tokens = Callable[..., Tensor]

TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def test_the_choice_of_layers_is_among_global_ones(build: Builder) -> None:
    model = build("gemma3_text", layer_types=TYPES, num_hidden_layers=4, sliding_window=6)
    with pytest.raises(LolcatsError, match=r"global layers are \[1, 3\]"):
        convert(model, LinearizationConfig(layers=[0]))
    convert(model, LinearizationConfig(layers=[-1]))
    assert [layer.layer_idx for layer in linearized_layers(model)] == [3]


@pytest.mark.parametrize("family", ["mistral", "phi3", "mixtral"])
def test_a_model_of_local_layers_only_is_refused(build: Builder, family: str) -> None:
    with pytest.raises(LolcatsError, match=r"ForCausalLM cannot be linearized: all its attention layers are local"):
        convert(build(family, sliding_window=6))


def test_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(LolcatsError, match=r"T5ForConditionalGeneration is an encoder-decoder"):
        convert(T5ForConditionalGeneration(config))


def test_a_model_without_a_head_is_refused(teacher: LlamaForCausalLM) -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    with pytest.raises(LolcatsError, match=r"AutoModelForCausalLM"):
        convert(LlamaModel(config))  # type: ignore[arg-type]


def test_a_converted_model_is_refused(make_student: Builder) -> None:
    with pytest.raises(LolcatsError, match=r"already linearized"):
        convert(make_student(window=4))


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("falcon", r"FalconForCausalLM .*its attention \(FalconAttention.*\) does not go through .* interface"),
        ("mamba", r"MambaForCausalLM .*its attention \(MambaMixer\) does not go through .* interface"),
    ],
)
def test_attention_outside_the_interface_is_refused(build: Builder, family: str, why: str) -> None:
    model = build(family, num_key_value_heads=None, head_dim=None, intermediate_size=None)
    kind = type(model)
    with pytest.raises(LolcatsError, match=why):
        convert(model)
    assert type(model) is kind


def test_heads_of_another_size_than_announced_are_refused(tokens: Tokens, teacher: LlamaForCausalLM) -> None:
    """A module whose queries are not what its config says must not pass through feature maps made for others."""
    model = convert(teacher, LinearizationConfig(window=4))
    for layer in linearized_layers(model):
        layer.inner.head_dim = 3  # type: ignore[assignment]  # twice as many heads of half the size
    with pytest.raises(
        LolcatsError, match=r"expected 6 query heads and 2 key heads of size 6; LlamaAttention gives queries"
    ):
        linearized_layers(model)[0].check_sizes(torch.zeros(1, 12, 5, 3), torch.zeros(1, 4, 5, 3))


def test_two_families_side_by_side(build: Builder, make_student: Builder, tokens: Tokens) -> None:
    one, two = make_student(build("qwen2"), window=4), make_student(build("phi"), window=4)
    assert type(one).__name__ == "LinearizedQwen2ForCausalLM"
    assert type(two).__name__ == "LinearizedPhiForCausalLM"
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(one)(tokens()).logits, one(tokens()).logits)


def test_a_family_with_the_name_of_what_is_added_is_refused(make_teacher: Callable[..., Any]) -> None:
    """Else its own weights would be taken for added ones."""
    teacher = make_teacher()
    teacher.model.layers[1].mixer = torch.nn.Linear(2, 2)
    with pytest.raises(LolcatsError, match=r"has a parameter model.layers.1.mixer.weight; the name 'mixer'"):
        convert(teacher)
    assert not linearized_layers(teacher)
