"""The self-check: families that are understood, and each kind of fact that is not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaAttention

from lolcats import LinearizationConfig, LolcatsError, convert, linearized_layers
from lolcats.modeling import LinearizedLayer, attention, check_family, check_model
from lolcats.modeling.check import plain_attention

Builder = Callable[..., Any]
Tokens = Callable[..., Tensor]


@pytest.fixture(scope="module")
def families() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "families.py"
    spec = importlib.util.spec_from_file_location("families", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


UNDERSTOOD = [
    "hyperclovax", "modernbert-decoder", "roberta", "llama4_text", "gemma4_text", "bart", "gpt_bigcode", "minicpm3",
    "whisper", "nanochat", "lfm2", "bigbird_pegasus", "dbrx", "jamba", "cohere_compass_text", "xmod",
]  # fmt: skip
REFUSED = {
    "falcon_h1": r"of type hybrid, which keep",
    "deepseek_v32": r"of type indexed_attention",
    "diffllama": r"expected one call .* in layer 0; it makes 2",
    "hrm_text": r"expected one call .* in layer 0; it makes \d+",
    "zamba2": r"of type hybrid, which keep",
    "git": r"does not go through transformers' attention interface",
}


@pytest.mark.parametrize("family", UNDERSTOOD)
def test_families_that_are_understood(families: ModuleType, family: str) -> None:
    outcome = families.try_family(family)
    assert outcome.result == "understood", outcome


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_are_refused_with_the_true_reason(families: ModuleType, family: str) -> None:
    model = families.build(family)
    kind, settings = type(model), model.config.to_dict()
    with pytest.raises(LolcatsError, match=REFUSED[family]):
        convert(model)
    assert type(model) is kind and model.config.to_dict() == settings


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_no_family_is_misunderstood(families: ModuleType, family: str) -> None:
    """Of all families that transformers has, the self-check has to refuse one, by the mask that it adds to scores."""
    outcome = families.try_family(family)
    assert (outcome.result == "not understood") == (family == "doge"), outcome


def test_an_encoder_is_no_causal_decoder(families: ModuleType) -> None:
    with pytest.raises(LolcatsError, match=r"a later token changes its earlier logits; expected a causal decoder"):
        convert(families.build("roberta", is_decoder=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{"window": 4, "sinks": 2, "window_kind": "terraced", "decay": "gate"}, {"layers": [1]}]
)
def test_a_checked_model_is_what_it_was(
    make_student: Builder, tokens: Tokens, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    student = make_student(**settings).to(dtype).train()
    layers = linearized_layers(student)
    state = [(layer.mixer.settings, layer.mixer.impl, layer.mode, layer.observer) for layer in layers]
    names = [name for name, _ in student.named_modules()]
    random = torch.get_rng_state()
    with torch.no_grad():
        expected = student.eval()(tokens()).logits
    assert check_model(student.train()).ok
    assert student.training and linearized_layers(student) == layers
    assert [(layer.mixer.settings, layer.mixer.impl, layer.mode, layer.observer) for layer in layers] == state
    assert [name for name, _ in student.named_modules()] == names
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        assert torch.equal(student.eval()(tokens()).logits, expected)


def test_the_plain_model_is_the_one_before_conversion(teacher: LlamaForCausalLM, tokens: Tokens) -> None:
    with torch.no_grad():
        expected = teacher(tokens()).logits
        convert(teacher, LinearizationConfig(window=4))
        with plain_attention(teacher):
            assert not linearized_layers(teacher)
            assert torch.equal(teacher(tokens()).logits, expected)
        assert not torch.equal(teacher(tokens()).logits, expected)


def failing(check: Any) -> list[str]:
    return [fact.name for fact in check.facts if not fact.ok]


def test_a_scale_that_is_not_honoured_is_found(make_student: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = attention.mixer_interface

    def deaf(*args: Any, scaling: float | None = None, **kwargs: Any) -> Any:
        return plain(*args, scaling=2 * (scaling or 1.0), **kwargs)

    student = make_student(window=4)
    attention.AttentionInterface.register(attention.NAME, deaf)
    try:
        check = check_model(student)
    finally:
        attention.AttentionInterface.register(attention.NAME, plain)
    assert set(failing(check)) >= {"softmax, full", "window, full", "window, pieces", "window, padding"}
    with pytest.raises(LolcatsError, match=r"^LlamaForCausalLM does something .* softmax mode .* off by"):
        check.require()


def test_a_state_that_goes_wrong_is_found_in_pieces(make_student: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = attention.LinearizedLayer.advance

    def forget(self: Any, state: Any, tokens: int, **kwargs: Any) -> None:
        plain(self, state._replace(window=state.window._replace(k=state.window.k * 0)), tokens, **kwargs)

    monkeypatch.setattr(attention.LinearizedLayer, "advance", forget)
    assert failing(check_model(make_student(window=4))) == ["window, pieces"]


def test_what_a_family_hands_over_is_known_or_refused(
    make_teacher: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LlamaAttention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, position_bias=torch.zeros(1), **kwargs)

    forward.__wrapped__ = plain  # type: ignore[attr-defined]  # calls_interface looks at the family's own code
    monkeypatch.setattr(LlamaAttention, "forward", forward)
    teacher = make_teacher()
    with pytest.raises(LolcatsError, match=r"LlamaAttention hands position_bias to its attention function"):
        convert(teacher)
    assert type(teacher) is LlamaForCausalLM
    monkeypatch.undo()
    convert(teacher)
    with pytest.raises(LolcatsError, match=r"hands alibi to its attention function"):
        teacher(torch.arange(5)[None], alibi=torch.zeros(4))


def test_check_family_leaves_the_model_alone(teacher: LlamaForCausalLM, tokens: Tokens) -> None:
    assert check_family(teacher, tokens(1)).ok
    assert type(teacher) is LlamaForCausalLM and not linearized_layers(teacher)


GEMMA = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4, "sliding_window": 6}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
@torch.no_grad()
def test_layers_that_share_keys_and_values(families: ModuleType, tokens: Tokens, family: str) -> None:
    """Each keeps a state of its own; a prompt, its pieces and single tokens give one text."""
    model = families.build(family, num_kv_shared_layers=2, **GEMMA)
    student: Any = convert(model, LinearizationConfig(window=4, sinks=2, decay="gate"))
    assert [layer.layer_idx for layer in linearized_layers(student)] == [1, 3]
    assert check_model(student).ok
    student.generation_config.eos_token_id = None
    ids, options = tokens(1), {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    got = student.generate(ids, output_logits=True, **options)
    full = student(got.sequences, use_cache=False).logits[:, 23:-1]
    torch.testing.assert_close(torch.stack(got.logits, 1), full, atol=5e-4, rtol=1e-3)
    cache = DynamicCache(config=student.config)
    parts = [student(part, past_key_values=cache).logits for part in ids.split([9, 8, *[1] * 7], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), student(ids).logits, atol=5e-4, rtol=1e-3)
    own = [layer.nbytes for layer in cache.layers if isinstance(layer, LinearizedLayer)]
    assert len(own) == 2 and own[0] == own[1] > 0


def test_layers_that_share_are_linearized_together(families: ModuleType) -> None:
    model = families.build("gemma4_text", num_kv_shared_layers=2, **GEMMA)
    for layers in ([1], [3]):
        with pytest.raises(
            LolcatsError, match=r"layers \[1, 3\] share .*num_kv_shared_layers = 2.* all of them or none"
        ):
            convert(model, LinearizationConfig(layers=layers))


def test_layers_of_different_sizes(families: ModuleType) -> None:
    """Gemma 4's global layers have larger heads, and may take their keys as values."""
    model = families.build(
        "gemma4_text", attention_k_eq_v=True, num_global_key_value_heads=1, global_head_dim=16, **GEMMA
    )
    student = convert(model, LinearizationConfig(window=4))
    assert {layer.mixer.sizes[:3] for layer in linearized_layers(student)} == {(4, 1, 16)}
    assert check_model(student).ok
