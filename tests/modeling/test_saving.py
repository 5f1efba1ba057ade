"""Converted models on disk: what is loaded is what was saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from lolcats import LolcatsError
from lolcats.modeling import LinearizedAttention, linearized_layers

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 8},
        {"window": 8, "layers": [0, -1], "feature_map": "t2r", "feature_size": 5},
        {"window": 4, "sinks": 2, "window_kind": "terraced", "decay": "gate", "state_heads": "kv"},
        {"window": 8, "layers": 0.5, "feature_map": "elu"},
    ],
    ids=str,
)
def test_loaded_is_saved(make_student: Students, tokens: Tokens, tmp_path: Path, settings: dict[str, Any]) -> None:
    student = make_student(**settings)
    expected = student(tokens()).logits
    student.save_pretrained(tmp_path / "a")
    load: Any = AutoModelForCausalLM.from_pretrained
    loaded, report = load(tmp_path / "a", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(student)
    assert issubclass(type(loaded), LlamaForCausalLM)
    assert torch.equal(loaded(tokens()).logits, expected)
    text = student.generate(tokens(), max_new_tokens=5, do_sample=False)  # type: ignore[operator]
    assert torch.equal(loaded.generate(tokens(), max_new_tokens=5, do_sample=False, eos_token_id=None), text)
    loaded.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(again(tokens()).logits, expected)


def test_only_safetensors_and_json_are_written(make_student: Students, tmp_path: Path) -> None:
    make_student(window=8).save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_large_models_are_saved_in_parts(make_student: Students, tokens: Tokens, tmp_path: Path) -> None:
    student = make_student(window=8)
    student.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, student(tokens()).logits)


def test_tied_embeddings_stay_tied(
    make_teacher: Callable[..., LlamaForCausalLM], make_student: Students, tokens: Tokens, tmp_path: Path
) -> None:
    student = make_student(make_teacher(tie_word_embeddings=True), window=4)
    student.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)


def test_added_parameters_stay_float32(make_student: Students, tokens: Tokens, tmp_path: Path) -> None:
    student = make_student(window=4, decay="gate")
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for before, after in zip(linearized_layers(student), linearized_layers(loaded), strict=True):
        assert {p.dtype for p in after.inner.parameters()} == {torch.bfloat16}
        for name, p in after.mixer.named_parameters():
            assert p.dtype == torch.float32
            assert torch.equal(p, before.mixer.get_parameter(name)), name
    assert loaded(tokens()).logits.dtype == torch.bfloat16
    assert loaded.dtype == torch.bfloat16


def test_a_bfloat16_student_comes_back_as_it_was(
    make_teacher: Callable[..., LlamaForCausalLM], make_student: Students, tokens: Tokens, tmp_path: Path
) -> None:
    make_teacher().save_pretrained(tmp_path / "teacher")
    teacher = LlamaForCausalLM.from_pretrained(tmp_path / "teacher", dtype=torch.bfloat16)
    student = make_student(teacher, window=4)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in student.parameters()]
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)


def test_config_round_trip(make_student: Students, tmp_path: Path) -> None:
    student = make_student(window=5, sinks=3, layers=[0, -1], feature_map="t2r")
    student.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "lolcats"
    assert written["base_model_type"] == "llama"
    assert written["linearization"]["layers"] == [0, -1]
    config: Any = AutoConfig.from_pretrained(tmp_path)
    assert config.linearization == student.config.linearization  # type: ignore[attr-defined]
    assert config.num_key_value_heads == 2
    assert type(config) is type(student.config)
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == written


def test_a_model_can_be_made_from_the_config_alone(make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=5, layers=[0, 2])
    made = AutoModelForCausalLM.from_config(student.config)
    assert [type(m) for m in made.modules()] == [type(m) for m in student.modules()]
    made.load_state_dict(student.state_dict())
    assert torch.equal(made.eval()(tokens()).logits, student(tokens()).logits)


@pytest.mark.parametrize(
    "change", [{"base_model_type": "no-such-family"}, {"base_model_type": None}, {"linearization": None}]
)
def test_a_broken_config_is_refused(make_student: Students, tmp_path: Path, change: dict[str, Any]) -> None:
    make_student(window=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(LolcatsError, match=r"save_pretrained"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layers", ["all", [1]])
def test_the_attention_of_softmax_layers_can_be_chosen_on_load(
    make_student: Students, tokens: Tokens, tmp_path: Path, attention: str, layers: Any
) -> None:
    student = make_student(window=4, layers=layers)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
    torch.testing.assert_close(loaded(tokens()).logits, student(tokens()).logits, atol=1e-4, rtol=0)
    for module in loaded.modules():
        if isinstance(module, LinearizedAttention):
            assert module.inner.config._attn_implementation == "lolcats"  # type: ignore[union-attr]


def test_changing_the_attention_later_leaves_linearized_layers_alone(make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=4, layers=[0, 2])
    expected = student(tokens()).logits
    student.set_attn_implementation("eager")
    torch.testing.assert_close(student(tokens()).logits, expected, atol=1e-4, rtol=0)
