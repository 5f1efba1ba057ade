"""A converted model as a function: what it keeps of its teacher, and that how it is called changes nothing."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from lolcats import LolcatsError
from lolcats.config import LinearizationConfig
from lolcats.modeling import LinearizedAttention, attention_mode, convert, linearized_layers

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("no_gradients")

LAYERS = [
    pytest.param({"window": 8, "fold": 3}, id="sliding"),
    pytest.param({"window": 0}, id="no-window"),
    pytest.param({"window": 8, "sinks": 4}, id="sinks"),
    pytest.param({"window": 5, "sinks": 3, "window_kind": "terraced"}, id="terraced"),
    pytest.param({"window": 8, "sinks": 2, "decay": "gate", "fold": 5}, id="gate"),
    pytest.param({"window": 8, "decay": "gate", "state_heads": "kv"}, id="gate-kv"),
    pytest.param({"window": 8, "sinks": 2, "layers": [0, -1]}, id="mixed"),
    pytest.param({"window": 8, "layers": [1], "window_kind": "terraced"}, id="first-layer-softmax"),
]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sinks": 4},
        {"window_kind": "terraced"},
        {"layers": [0, 2]},
        {"decay": "gate"},
        {"decay": "gate", "state_heads": "kv", "sinks": 4},
        {"feature_map": "t2r", "layers": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [24, 100])
def test_window_over_the_whole_text_is_the_teacher(
    teacher: Any, make_student: Students, tokens: Tokens, settings: dict[str, Any], window: int
) -> None:
    student = make_student(window=window, **settings)
    assert distance(student(tokens()).logits, teacher(tokens()).logits) < 1e-4


def test_window_one_token_too_short_is_not_the_teacher(teacher: Any, make_student: Students, tokens: Tokens) -> None:
    difference = (make_student(window=23)(tokens()).logits - teacher(tokens()).logits).abs().amax((0, 2))
    assert float(difference[:23].max()) < 1e-4
    assert float(difference[23]) > 1e-3


@pytest.mark.parametrize("settings", LAYERS)
def test_convert_keeps_every_weight_of_the_teacher(teacher: Any, settings: dict[str, Any]) -> None:
    objects = dict(teacher.named_parameters())
    values = {name: p.clone() for name, p in objects.items()}
    student = convert(teacher, LinearizationConfig(**settings))
    assert student is teacher
    kept = {n.replace(".inner.", "."): p for n, p in student.named_parameters()}
    for name, p in objects.items():
        assert kept[name] is p
        assert torch.equal(p, values[name])
    added = {id(p) for layer in linearized_layers(student) for p in layer.mixer.parameters()}
    assert {id(p) for p in student.parameters()} == added | {id(p) for p in objects.values()}


@pytest.mark.parametrize("settings", LAYERS)
def test_softmax_mode_is_the_teacher(
    teacher: Any, make_student: Students, tokens: Tokens, settings: dict[str, Any]
) -> None:
    student = make_student(**settings)
    before = student(tokens()).logits
    with attention_mode(student, "softmax"):
        assert distance(student(tokens()).logits, teacher(tokens()).logits) < 1e-5
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens()], 1)
        mask = (padded > 0).long()
        expected = teacher(padded, attention_mask=mask).logits[:, 3:]
        assert distance(student(padded, attention_mask=mask).logits[:, 3:], expected) < 1e-5
    assert torch.equal(student(tokens()).logits, before)


def test_softmax_mode_decodes_like_the_teacher(teacher: Any, make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=4)
    with attention_mode(student, "softmax"):
        assert torch.equal(
            student.generate(tokens(), max_new_tokens=6, do_sample=False),
            teacher.generate(tokens(), max_new_tokens=6, do_sample=False),
        )


def test_modes_come_back_after_an_error(make_student: Students) -> None:
    student = make_student(window=4)
    with pytest.raises(KeyError), attention_mode(student, "softmax"), attention_mode(student, "window_only"):
        raise KeyError
    assert {layer.mode for layer in linearized_layers(student)} == {"full"}


@pytest.mark.parametrize("cuts", [[1], [3, 4], [8], [9, 17, 23], [23], list(range(1, 24))], ids=str)
@pytest.mark.parametrize("settings", LAYERS)
def test_prefill_and_decode_split_anywhere(
    make_student: Students, tokens: Tokens, settings: dict[str, Any], cuts: list[int]
) -> None:
    student, ids = make_student(**settings), tokens()
    cache = DynamicCache(config=student.config)
    bounds = [0, *cuts, 24]
    parts = [student(ids[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(bounds)]
    assert distance(torch.cat(parts, 1), student(ids, use_cache=False).logits) < 2e-4
    assert cache.get_seq_length() == 24


@pytest.mark.parametrize("impl", ["reference", "chunked", "recurrent"])
def test_implementations_agree(make_student: Students, tokens: Tokens, impl: str) -> None:
    settings = {"window": 7, "sinks": 3, "decay": "gate"}
    assert (
        distance(make_student(impl=impl, **settings)(tokens()).logits, make_student(**settings)(tokens()).logits) < 2e-4
    )


@pytest.mark.parametrize("settings", LAYERS)
def test_appended_tokens_change_nothing_before_them(
    make_student: Students, tokens: Tokens, settings: dict[str, Any]
) -> None:
    student = make_student(**settings)
    long = student(tokens()).logits
    for n in (1, 7, 8, 9, 10, 17, 23):
        assert distance(student(tokens()[:, :n]).logits, long[:, :n]) < 2e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("settings", LAYERS)
def test_packed_texts_are_separate_texts(
    make_teacher: Callable[..., LlamaForCausalLM],
    make_student: Students,
    tokens: Tokens,
    settings: dict[str, Any],
    attention: str,
) -> None:
    student, ids = make_student(make_teacher(attn_implementation=attention), **settings), tokens(1)
    lengths = [1, 14, 9]
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    together = student(ids, position_ids=position, use_cache=False).logits
    alone = torch.cat([student(part).logits for part in ids.split(lengths, 1)], 1)
    assert distance(together, alone) < 2e-4
    with attention_mode(student, "softmax"):
        together = student(ids, position_ids=position, use_cache=False).logits
        alone = torch.cat([student(part).logits for part in ids.split(lengths, 1)], 1)
    assert distance(together, alone) < 1e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("settings", [LAYERS[2], LAYERS[3], LAYERS[4], LAYERS[6]])
def test_padding_changes_nothing(
    make_teacher: Callable[..., LlamaForCausalLM],
    make_student: Students,
    tokens: Tokens,
    settings: dict[str, Any],
    side: str,
    attention: str,
    use_cache: bool,
) -> None:
    student, ids = make_student(make_teacher(attn_implementation=attention), **settings), tokens()
    pad = torch.zeros(1, 5, dtype=torch.long)
    short = ids[1:, :19]
    batch = torch.cat([ids[:1], torch.cat([pad, short] if side == "left" else [short, pad], 1)])
    mask = (batch > 0).long()
    logits = student(
        batch, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), use_cache=use_cache
    ).logits
    real = slice(5, None) if side == "left" else slice(None, 19)
    assert distance(logits[:1], student(ids[:1]).logits) < 2e-4
    assert distance(logits[1:, real], student(short).logits) < 2e-4


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("all", [0, 1, 2, 3]), ([1], [1]), ([-1, 0], [0, 3]), (0.5, [1, 3]), (0.25, [3]), (1.0, [0, 1, 2, 3])],
    ids=str,
)
def test_layers_to_convert(make_teacher: Callable[..., LlamaForCausalLM], layers: Any, expected: list[int]) -> None:
    model = convert(make_teacher(num_hidden_layers=4), LinearizationConfig(layers=layers))
    found = [i for i, m in enumerate(model.model.layers) if isinstance(m.self_attn, LinearizedAttention)]
    assert found == expected == [layer.layer_idx for layer in linearized_layers(model)]


@pytest.mark.parametrize("state_heads", ["query", "kv"])
@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r", "elu", "relu", "exp_dim"])
def test_feature_maps_of_query_and_key_heads(
    make_student: Students, tokens: Tokens, feature_map: str, state_heads: str
) -> None:
    student, ids = make_student(window=4, feature_map=feature_map, state_heads=state_heads), tokens()
    cache = student(ids[:, :20]).past_key_values
    learned = feature_map in ("hedgehog", "t2r", "exp_dim")
    expected = 6 if state_heads == "query" and learned else 2
    assert cache.layers[0].state.linear.kv.shape[1] == expected
    step = student(ids[:, 20:21], past_key_values=cache).logits
    assert distance(step, student(ids[:, :21]).logits[:, -1:]) < 2e-4


def test_quadratic_formula(
    make_student: Students, tokens: Tokens, record_calls: Callable[..., Any], quadratic: Callable[..., Tensor]
) -> None:
    for layer, call, _ in record_calls(make_student(window=6, sinks=2), tokens()):
        assert distance(layer.mixer(call)[0], quadratic(layer, call)) < 1e-5


def test_observer_sees_what_the_teacher_computes(
    teacher: Any, make_student: Students, tokens: Tokens, record_calls: Callable[..., Any]
) -> None:
    hidden = teacher(tokens(), output_hidden_states=True).hidden_states
    for i, (layer, call, out) in enumerate(record_calls(make_student(window=6), tokens())):
        assert layer.layer_idx == i
        normed = teacher.model.layers[i].input_layernorm(hidden[i])
        assert distance(call.hidden, normed) < 1e-5
        expected = teacher.model.layers[i].self_attn.o_proj(out.transpose(1, 2).flatten(2))
        residual = hidden[i] + expected
        after = residual + teacher.model.layers[i].mlp(teacher.model.layers[i].post_attention_layernorm(residual))
        if i < 2:
            assert distance(after, hidden[i + 1]) < 1e-4


def test_deepcopy_is_independent(make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=4, layers=[0, 2])
    twin = copy.deepcopy(student)
    before = student(tokens()).logits
    assert torch.equal(twin(tokens()).logits, before)
    with attention_mode(twin, "no_attention"):
        for p in twin.parameters():
            p.zero_()
        assert torch.equal(student(tokens()).logits, before)


@pytest.mark.parametrize("layers", ["all", [0]])
def test_convert_leaves_a_model_of_the_same_config_alone(
    make_teacher: Callable[..., LlamaForCausalLM], tokens: Tokens, layers: Any
) -> None:
    first = make_teacher()
    second = LlamaForCausalLM(first.config).eval()
    second.load_state_dict(first.state_dict())
    expected = second(tokens()).logits
    convert(first, LinearizationConfig(window=4, layers=layers))
    assert torch.equal(second(tokens()).logits, expected)
    assert second.config.model_type == "llama"


def test_refused_conversion_leaves_the_model_as_it_was(teacher: Any, tokens: Tokens) -> None:
    expected = teacher(tokens()).logits
    with pytest.raises(LolcatsError, match=r"\[9\].*\[0, 1, 2\]"):
        convert(teacher, LinearizationConfig(layers=[0, 9]))
    assert type(teacher) is LlamaForCausalLM
    assert teacher.config.model_type == "llama"
    assert torch.equal(teacher(tokens()).logits, expected)
    convert(teacher, LinearizationConfig(layers=[0]))
    assert teacher.config.base_model_type == "llama"  # type: ignore[attr-defined]


def test_gradients_flow_through_a_converted_model(make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=4)
    with torch.enable_grad():
        student(tokens(), labels=tokens(), use_cache=False).loss.backward()
    for name, p in student.named_parameters():
        assert p.grad is not None and float(p.grad.abs().sum()) > 0, name


def test_activation_checkpointing_changes_nothing(make_student: Students, tokens: Tokens) -> None:
    plain, checkpointed = make_student(window=4), make_student(window=4)
    checkpointed.activation_checkpointing_enable()
    with torch.enable_grad():
        for model in (plain, checkpointed):
            model.train()
            model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    for p, q in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("mode", ["window_only", "linear_only", "no_attention"])
def test_controls_decode_as_they_prefill(make_student: Students, tokens: Tokens, mode: Any) -> None:
    student, ids = make_student(window=4, sinks=2), tokens()
    with attention_mode(student, mode):
        full = student(ids).logits
        cache = student(ids[:, :15]).past_key_values
        steps = [student(ids[:, i : i + 1], past_key_values=cache).logits for i in range(15, 24)]
    assert distance(torch.cat(steps, 1), full[:, 15:]) < 2e-4
