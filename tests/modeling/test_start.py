"""The matched start: each head's linear share comes from its teacher before any training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from lolcats import LolcatsError
from lolcats.config import LinearizationConfig
from lolcats.mixers import start
from lolcats.modeling import AttentionCall, convert, linearized_layers
from lolcats.modeling.start import start_from_text

Tokens = Callable[..., Tensor]
SETTINGS = [
    {"window": 6},
    {"window": 6, "sinks": 2},
    {"window": 4, "sinks": 1, "window_kind": "terraced"},
    {"window": 6, "state_heads": "kv"},
    {"window": 6, "decay": "gate"},
    {"window": 6, "feature_map": "exp_dim", "layers": [0, 2]},
]


def shares(layer: Any, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Mean over far-seeing queries: (teacher's far share [H], log odds of the hybrid's linear share [H])."""
    s, (heads, n) = layer.mixer.settings, call.q.shape[1:3]
    k = call.k.repeat_interleave(heads // call.k.shape[1], 1)
    phi_q = layer.mixer.feature_q(call.q) * layer.mixer.get_parameter("query_scale").exp()[:, None, None]
    phi_k = layer.mixer.feature_k(call.k)
    phi_k = phi_k.repeat_interleave(heads // phi_k.shape[1], 1)
    decay = layer.mixer.log_decay(call.hidden)
    teacher, odds = [], []
    for i in range(n):
        local = {
            j
            for j in range(i + 1)
            if (i - j < s.window if s.window_kind == "sliding" else i // s.window - j // s.window < 2)
        }
        near = sorted(local | set(range(min(s.sinks, i + 1))))
        far = sorted(set(range(i + 1)) - set(near))
        if not far:
            continue
        scores = torch.einsum("bhd,bhjd->bhj", call.q[:, :, i], k[:, :, : i + 1]) * call.scale
        teacher.append(scores.softmax(-1)[..., far].sum(-1))
        soft = (scores[..., near] - scores[..., near].amax(-1, keepdim=True)).exp().sum(-1)
        linear = torch.einsum("bhf,bhjf->bhj", phi_q[:, :, i], phi_k[:, :, far])
        if decay is not None:
            linear = linear * torch.stack([decay[:, :, j + 1 : i + 1].sum(-1).exp() for j in far], -1)
        odds.append((linear.sum(-1) / soft).log())
    return torch.stack(teacher).mean((0, 1)), torch.stack(odds).mean((0, 1))


def output_errors(layer: Any, call: AttentionCall, teacher: Tensor) -> Tensor:
    """Squared error [H] of the layer's output over the queries that have far keys."""
    s, n = layer.mixer.settings, call.q.shape[2]
    reach = s.window if s.window_kind == "sliding" else 2 * s.window
    first = max(reach, s.window + s.sinks if s.window_kind == "sliding" else reach)
    with torch.no_grad():
        return (layer.mixer(call)[0] - teacher)[:, :, min(first, n) :].square().mean((0, 2, 3))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_linear_share_is_the_teachers_or_the_best_one_near_it(
    teacher: LlamaForCausalLM, tokens: Tokens, record_calls: Callable[..., Any], settings: dict[str, Any]
) -> None:
    ids = tokens(3, 30)
    student = convert(teacher, LinearizationConfig(start="matched", **settings), input_ids=ids)
    calls = record_calls(student, ids)
    assert len(calls) == len(linearized_layers(student))
    for layer, call, out in calls:
        expected, odds = (x.detach() for x in shares(layer, call))
        offset = odds - torch.logit(expected.clamp(1e-4, 1 - 1e-4))
        chosen = (offset[:, None] - torch.tensor(start.OFFSETS)).abs().min(-1)
        assert float(chosen.values.max()) < 1e-3
        best = output_errors(layer, call, out)
        matched = layer.mixer.get_parameter("query_scale").detach() - offset
        for other in start.OFFSETS:
            layer.mixer.get_parameter("query_scale").data = matched + other
            assert bool((output_errors(layer, call, out) >= best * (1 - 1e-4)).all())
        assert float(layer.mixer.get_parameter("window_factor").detach().sigmoid().min()) > 0.9


@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r", "elu", "relu", "exp_dim"])
def test_matched_start_is_finite_for_every_feature_map(
    teacher: LlamaForCausalLM, tokens: Tokens, feature_map: Any
) -> None:
    config = LinearizationConfig(window=6, feature_map=feature_map, start="matched")
    student = convert(teacher, config, input_ids=tokens(3, 30))
    for layer in linearized_layers(student):
        assert bool(layer.mixer.get_parameter("query_scale").isfinite().all())
    with torch.no_grad():
        assert bool(student(tokens()).logits.isfinite().all())


@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r", "elu", "relu", "exp_dim"])
def test_matched_start_is_nearer_to_the_teacher_than_the_papers(
    teacher: LlamaForCausalLM, tokens: Tokens, feature_map: Any
) -> None:
    ids = tokens(4, 40)
    with torch.no_grad():
        expected = teacher(ids).logits.log_softmax(-1)
    divergence = {}
    for name in ("paper", "matched"):
        config = LinearizationConfig(window=8, sinks=1, feature_map=feature_map, start=name)  # type: ignore[arg-type]
        student: Any = convert(copy.deepcopy(teacher), config, input_ids=ids)
        with torch.no_grad():
            got = student(ids).logits.log_softmax(-1)
        divergence[name] = float((expected.exp() * (expected - got)).sum(-1).mean())
    assert divergence["matched"] < divergence["paper"]


def test_matched_start_needs_tokens(teacher: LlamaForCausalLM) -> None:
    with pytest.raises(LolcatsError, match=r"input_ids"):
        convert(teacher, LinearizationConfig(start="matched"))
    assert type(teacher) is LlamaForCausalLM


def test_a_text_within_the_window_leaves_the_scales_alone(teacher: LlamaForCausalLM, tokens: Tokens) -> None:
    student = convert(teacher, LinearizationConfig(window=64, start="matched"), input_ids=tokens())
    for layer in linearized_layers(student):
        assert torch.equal(layer.mixer.get_parameter("query_scale"), torch.zeros(6))


def test_papers_start(teacher: LlamaForCausalLM) -> None:
    for layer in linearized_layers(convert(teacher, LinearizationConfig())):
        torch.testing.assert_close(layer.mixer.get_parameter("window_factor").detach().sigmoid(), torch.full((6,), 0.1))
        assert torch.equal(layer.mixer.get_parameter("query_scale"), torch.zeros(6))


def test_matched_start_leaves_no_trace(teacher: LlamaForCausalLM, tokens: Tokens) -> None:
    weights = {name: p.clone() for name, p in teacher.named_parameters()}
    student: PreTrainedModel = convert(teacher, LinearizationConfig(window=6, start="matched"), input_ids=tokens())
    for layer in linearized_layers(student):
        assert layer.observer is None
        assert all(p.grad is None for p in layer.parameters())
    kept = {n.replace(".inner.", "."): p for n, p in student.named_parameters()}
    assert all(torch.equal(kept[name], value) for name, value in weights.items())


@pytest.mark.parametrize("start_", ["paper", "matched"])
@pytest.mark.parametrize(
    "settings",
    [
        {"window": 0},
        {"window": 0, "decay": "gate"},
        {"window": 0, "sinks": 2},
        {"window": 4, "sinks": 50},
        {"window": 0, "feature_map": "relu"},
        {"window": 1, "window_kind": "terraced"},
        {"window": 29},
    ],
    ids=str,
)
def test_every_start_is_finite_and_trains(
    teacher: LlamaForCausalLM, tokens: Tokens, settings: dict[str, Any], start_: Any
) -> None:
    ids = tokens(3, 30)
    student: Any = convert(teacher, LinearizationConfig(start=start_, **settings), input_ids=ids)
    assert all(bool(p.isfinite().all()) for p in student.parameters())
    student(ids, labels=ids, use_cache=False).loss.backward()
    for layer in linearized_layers(student):
        for name, p in layer.mixer.named_parameters():
            assert p.grad is not None and bool(p.grad.isfinite().all()), name


def test_matched_start_of_a_bfloat16_teacher_is_finite(teacher: LlamaForCausalLM, tokens: Tokens) -> None:
    config = LinearizationConfig(window=0, start="matched")
    for layer in linearized_layers(convert(teacher.bfloat16(), config, input_ids=tokens(3, 30))):
        assert bool(layer.mixer.get_parameter("query_scale").isfinite().all())


def test_features_that_are_all_zero_get_no_scale(teacher: LlamaForCausalLM, tokens: Tokens) -> None:
    student = convert(teacher, LinearizationConfig(window=4, feature_map="t2r"))
    first: Any = linearized_layers(student)[0]
    with torch.no_grad():
        first.mixer.feature_k.weight.zero_()
    start_from_text(student, [first], tokens(3, 30))
    assert torch.equal(first.mixer.query_scale, torch.zeros(6))


def test_a_teacher_that_is_not_finite_is_named_with_its_layer(teacher: LlamaForCausalLM, tokens: Tokens) -> None:
    broken: Any = teacher.model.layers[1].self_attn
    with torch.no_grad():
        broken.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(LolcatsError, match=r"layer 1 is not finite"):
        convert(teacher, LinearizationConfig(window=4, start="matched"), input_ids=tokens(3, 30))


@pytest.mark.parametrize("settings", [{"decay": "gate"}, {"mixer": "blend", "window": 4, "kept": {"pairs": 2}}])
def test_a_seed_is_all_that_the_start_depends_on(teacher: LlamaForCausalLM, settings: dict[str, Any]) -> None:
    def start(seed: int | None, before: int) -> list[Tensor]:
        torch.manual_seed(before)
        expected = torch.get_rng_state()
        model = convert(copy.deepcopy(teacher), LinearizationConfig(**settings), seed=seed)
        assert torch.equal(torch.get_rng_state(), expected) == (seed is not None)
        return [p for layer in linearized_layers(model) for p in layer.mixer.parameters()]

    def same(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    draws = settings.get("mixer") == "blend"  # the gate starts with zeros
    assert same(start(3, 1), start(3, 2))
    assert same(start(3, 1), start(4, 1)) != draws
    assert same(start(None, 3), start(3, 1))
    assert same(start(None, 3), start(None, 4)) != draws
