"""Other families through the same hook, and the models that are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lolcats import LolcatsError
from lolcats.config import LinearizationConfig
from lolcats.modeling import attention_mode, convert, linearized_layers

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "phi": {},
    "phi3": {"sliding_window": None},
    "gpt_neox": {},
    "stablelm": {},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2, "logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.4},
    "mixtral": {"sliding_window": None, "num_local_experts": 2},
}


def build(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_and_decoding(make_student: Students, tokens: Tokens, family: str) -> None:
    teacher, ids = build(family, **FAMILIES[family]), tokens()
    expected = teacher(ids).logits
    exact = make_student(teacher, window=24)
    torch.testing.assert_close(exact(ids).logits, expected, atol=2e-4, rtol=0)
    student = make_student(teacher, window=5, sinks=2)
    assert len(linearized_layers(student)) == 3
    full = student(ids).logits
    assert float((full - expected).abs().max()) > 1e-3
    with attention_mode(student, "softmax"):
        torch.testing.assert_close(student(ids).logits, expected, atol=2e-4, rtol=0)
    cache = DynamicCache(config=student.config)
    parts = [student(part, past_key_values=cache).logits for part in ids.split([9, 8, *[1] * 7], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=5e-4, rtol=0)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    options = {"max_new_tokens": 4, "do_sample": False}
    got = student.generate(padded, attention_mask=(padded > 0).long(), **options)
    assert torch.equal(got[:, 3:], student.generate(ids, **options))


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "gemma3_text"])
def test_other_families_are_saved_and_loaded(
    make_student: Students, tokens: Tokens, tmp_path: Any, family: str
) -> None:
    types = {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}
    student = make_student(build(family, **(types if family == "gemma3_text" else {})), window=5)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(student)
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)


LOCAL: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6},
}
TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize("family", LOCAL)
def test_local_layers_stay_as_they_are(make_student: Students, tokens: Tokens, family: str) -> None:
    teacher, ids = build(family, layer_types=TYPES, num_hidden_layers=4, **LOCAL[family]), tokens()
    student = make_student(teacher, window=24)
    assert [layer.layer_idx for layer in linearized_layers(student)] == [1, 3]
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits, atol=2e-4, rtol=0)
    short = make_student(teacher, window=4)
    full = short(ids).logits
    cache = DynamicCache(config=short.config)
    parts = [short(part, past_key_values=cache).logits for part in ids.split([9, 8, *[1] * 7], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=5e-4, rtol=0)
    with pytest.raises(LolcatsError, match=r"global layers are \[1, 3\]"):
        convert(teacher, LinearizationConfig(layers=[0]))


@pytest.mark.parametrize("family", LOCAL)
def test_packed_texts_with_local_layers(make_student: Students, tokens: Tokens, family: str) -> None:
    teacher, ids = build(family, layer_types=TYPES, num_hidden_layers=4, **LOCAL[family]), tokens(1)
    student = make_student(teacher, window=4, sinks=2)
    position = torch.cat([torch.arange(11), torch.arange(13)])[None]
    together = student(ids, position_ids=position, use_cache=False).logits
    alone = torch.cat([student(part).logits for part in ids.split([11, 13], 1)], 1)
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=0)


def test_a_model_of_local_layers_only_is_refused() -> None:
    with pytest.raises(LolcatsError, match=r"local|sliding"):
        convert(build("mistral", sliding_window=6))


def test_capped_scores_are_refused(tokens: Tokens) -> None:
    types = ["full_attention"] * 3
    with pytest.raises(LolcatsError, match=r"cap"):
        convert(build("gemma2", attn_logit_softcapping=50.0, layer_types=types), LinearizationConfig(window=4))(
            tokens()
        )


def test_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(LolcatsError, match=r"T5ForConditionalGeneration is an encoder-decoder"):
        convert(T5ForConditionalGeneration(config))


def test_a_model_without_a_head_is_refused(teacher: LlamaForCausalLM) -> None:
    config = LlamaConfig(**{k: v for k, v in teacher.config.to_dict().items() if k in SIZES})
    with pytest.raises(LolcatsError, match=r"AutoModelForCausalLM"):
        convert(LlamaModel(config))  # type: ignore[arg-type]


def test_a_converted_model_is_refused(make_student: Students) -> None:
    with pytest.raises(LolcatsError, match=r"already linearized"):
        convert(make_student(window=4))


@pytest.mark.parametrize("family", ["falcon", "mamba"])
def test_attention_outside_the_interface_is_refused(family: str) -> None:
    sizes = {k: SIZES[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers")}
    if family == "falcon":
        sizes["num_attention_heads"] = 4
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    kind = type(model)
    with pytest.raises(LolcatsError, match=r"attention interface"):
        convert(model)
    assert type(model) is kind


def test_two_families_side_by_side(make_student: Students, tokens: Tokens) -> None:
    one, two = make_student(build("qwen2"), window=4), make_student(build("phi"), window=4)
    assert type(one).__name__ == "LinearizedQwen2ForCausalLM"
    assert type(two).__name__ == "LinearizedPhiForCausalLM"
    assert torch.equal(copy.deepcopy(one)(tokens()).logits, one(tokens()).logits)
