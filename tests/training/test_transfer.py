"""Stage 1: what is compared, what is trained, and what it costs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from lolcats import LolcatsError
from lolcats.config import TransferConfig
from lolcats.mixers.blend import BlendMixer
from lolcats.mixers.hybrid import HybridMixer
from lolcats.modeling import AttentionCall, LinearizedAttention, linearized_layers
from lolcats.training import TrainingData, TransferStage, transfer_attention
from lolcats.training.batches import Batch, make_batch

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]


def config(**changes: Any) -> TransferConfig:
    settings: dict[str, Any] = {"tokens": 20 * 4 * 3, "batch_size": 4, "warmup_steps": 1, "compile": False}
    return TransferConfig(**(settings | changes))


def plain_batch(ids: Tensor) -> Batch:
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), None, None)


def batch_of(packed: Callable[..., Any], ids: Tensor, document: list[list[int]]) -> Batch:
    data = packed(ids.numpy(), np.array(document))
    return make_batch(data, np.arange(len(data)), "cpu", keep_apart=True)


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    added = {id(p) for layer in linearized_layers(model) for p in layer.mixer.parameters()}
    return {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in added}


def naive_loss(
    student: PreTrainedModel, ids: Tensor, record: Callable[..., Any], hybrid: Callable[..., Tensor]
) -> Tensor:
    """1000 x mean over layers of the mean squared error, differentiable."""
    errors = [
        torch.nn.functional.mse_loss(hybrid(layer, detached(call)), teacher)
        for layer, call, teacher in record(student, ids)
    ]
    return 1000 * torch.stack(errors).mean()


def detached(call: AttentionCall) -> AttentionCall:
    return dataclasses.replace(
        call, q=call.q.detach(), k=call.k.detach(), v=call.v.detach(), hidden=call.hidden.detach()
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"window": 5},
        {"window": 5, "sinks": 2, "state_heads": "kv"},
        {"window": 3, "feature_map": "t2r", "layers": [0, 2]},
        {"window": 4, "sinks": 1, "feature_map": "exp_dim", "impl": "reference"},
    ],
    ids=str,
)
def test_gradient_is_that_of_the_quadratic_loss(
    make_student: Students,
    tokens: Tokens,
    record_calls: Callable[..., Any],
    quadratic: Callable[..., Tensor],
    settings: dict[str, Any],
) -> None:
    student, ids = make_student(**settings), tokens(2, 16)
    stage = TransferStage(student, config())
    metrics = stage.backward(plain_batch(ids), 1.0)
    got = {name: p.grad for name, p in stage.parameters().items()}
    for p in student.parameters():
        p.grad = None
    expected = naive_loss(student, ids, record_calls, quadratic)
    expected.backward()
    torch.testing.assert_close(metrics["loss"], expected.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(metrics["mse"] * 1000, expected.detach(), rtol=1e-4, atol=0)
    for name, p in stage.parameters().items():
        assert p.grad is not None
        torch.testing.assert_close(got[name], p.grad, rtol=2e-3, atol=1e-4)


def test_share_weighs_the_gradient(make_student: Students, tokens: Tokens) -> None:
    gradients = []
    for share in (1.0, 0.25):
        stage = TransferStage(make_student(window=4), config())
        stage.backward(plain_batch(tokens()), share)
        gradients.append([p.grad for p in stage.parameters().values()])
    for whole, quarter in zip(*gradients, strict=True):
        torch.testing.assert_close(whole * 0.25, quarter)


@pytest.mark.parametrize("decay", ["none", "gate"])
def test_only_the_added_parameters_are_trained(make_student: Students, tokens: Tokens, decay: str) -> None:
    student = make_student(window=4, decay=decay)
    stage = TransferStage(student, config())
    stage.backward(plain_batch(tokens()), 1.0)
    with_gradient = {name for name, p in student.named_parameters() if p.grad is not None}
    assert with_gradient == set(stage.parameters())
    assert {name.rpartition("self_attn.")[2] for name in with_gradient} == {
        "mixer.feature_q.weight", "mixer.feature_k.weight", "mixer.window_factor", "mixer.query_scale",
        *(("mixer.decay_gate.weight", "mixer.decay_gate.bias") if decay == "gate" else ()),
    }  # fmt: skip
    for name, p in stage.parameters().items():
        assert p.grad is not None and float(p.grad.abs().sum()) > 0, name


def test_an_output_that_does_not_learn_is_not_made(
    make_student: Students, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only scores learn, a step costs the teacher and the scores; a validation compares outputs as ever."""
    stage = TransferStage(make_student(mixer="blend", window=4, kept={"pairs": 3}, far="none"), config())
    batch, made = plain_batch(tokens()), []
    monkeypatch.setattr(BlendMixer, "_run", lambda *given: made.append(given))
    metrics = stage.backward(batch, 1.0)
    assert not made and metrics.keys() == {"loss", "layers"} and float(metrics["loss"]) > 0
    monkeypatch.undo()
    validated = stage.validate(batch)
    assert float(validated["loss"]) == pytest.approx(float(metrics["loss"] + 1000 * validated["mse"]), rel=1e-4)
    other = TransferStage(make_student(mixer="blend", window=4, kept={"pairs": 3}, far="linear"), config())
    assert "mse" in other.backward(batch, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"window": 4}, {"window": 4, "sinks": 2, "decay": "gate"}], ids=str)
def test_training_learns_and_leaves_the_teacher_alone(
    make_student: Students, training_data: TrainingData, settings: dict[str, Any]
) -> None:
    student = make_student(**settings)
    before = weights(student)
    stage = TransferStage(student, config())
    validation = plain_batch(torch.from_numpy(training_data.validation.ids).long())
    start = float(stage.validate(validation)["loss"])
    result = transfer_attention(student, training_data, config(tokens=20 * 4 * 25, validate_every=5))
    assert result.steps == 25
    assert result.best_loss < 0.95 * start
    assert float(TransferStage(student, config()).validate(validation)["loss"]) == pytest.approx(
        result.best_loss, rel=1e-4
    )
    assert all(torch.equal(p, before[name]) for name, p in weights(student).items())


def test_errors_of_one_layer_do_not_reach_the_next(make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=4)
    stage, batch = TransferStage(student, config()), plain_batch(tokens())
    before = stage.validate(batch)["layers"]
    with torch.no_grad():
        for p in linearized_layers(student)[0].mixer.parameters():
            p.mul_(-3)
    after = stage.validate(batch)["layers"]
    assert after.shape == (3,)
    assert torch.equal(before[1:], after[1:])
    assert float(before[0]) != float(after[0])


def test_the_model_is_left_ready_to_use(make_student: Students, training_data: TrainingData) -> None:
    student = make_student(window=4)
    transfer_attention(student, training_data, config())
    assert not any(p.requires_grad for p in student.parameters())
    for layer in linearized_layers(student):
        assert layer.observer is None
        assert layer.mode == "full"


def test_observers_are_taken_off_after_an_error(
    make_student: Students, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_student(window=4)
    stage = TransferStage(student, config())

    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(HybridMixer, "forward", broken)
    with pytest.raises(RuntimeError, match=r"broken"):
        stage.backward(plain_batch(tokens()), 1.0)
    assert all(layer.observer is None for layer in linearized_layers(student))


class _Held:
    """Counts the bytes that autograd holds."""

    alive = 0
    peak = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
        _Held.alive += self.bytes
        _Held.peak = max(_Held.peak, _Held.alive)

    def __del__(self) -> None:
        _Held.alive -= self.bytes


def test_memory_does_not_grow_with_depth(
    make_teacher: Callable[..., LlamaForCausalLM], make_student: Students, tokens: Tokens
) -> None:
    peaks = []
    for depth in (2, 6):
        stage = TransferStage(make_student(make_teacher(num_hidden_layers=depth), window=4), config())
        _Held.alive = _Held.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(_Held, lambda held: held.tensor):
            stage.backward(plain_batch(tokens()), 1.0)
        peaks.append(_Held.peak)
    assert peaks[0] > 0
    assert peaks[1] == peaks[0]


def cross_entropy(layer: LinearizedAttention, call: AttentionCall, quadratic: Callable[..., Tensor]) -> Tensor:
    """Of each query, between the weights of softmax and hybrid: [B, H, N]."""
    heads, n = call.q.shape[1:3]
    identity = torch.eye(n).expand(*call.k.shape[:2], n, n)
    hybrid = quadratic(layer, dataclasses.replace(call, v=identity))
    k = call.k.repeat_interleave(heads // call.k.shape[1], 1)
    scores = (call.q @ k.mT * call.scale).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    log_hybrid = torch.where(hybrid > 0, hybrid, 1.0).log()
    return -(scores.softmax(-1) * log_hybrid).sum(-1)


def test_cross_entropy_of_weights(
    make_student: Students, tokens: Tokens, record_calls: Callable[..., Any], quadratic: Callable[..., Tensor]
) -> None:
    student, ids = make_student(window=5, sinks=1), tokens(2, 14)
    stage = TransferStage(student, config(mse_factor=0.0, xent_factor=2.0))
    metrics = stage.backward(plain_batch(ids), 1.0)
    got = {name: p.grad for name, p in stage.parameters().items()}
    for p in student.parameters():
        p.grad = None
    parts = [cross_entropy(layer, detached(call), quadratic).mean() for layer, call, _ in record_calls(student, ids)]
    expected = 2 * torch.stack(parts).mean()
    expected.backward()
    torch.testing.assert_close(metrics["loss"], expected.detach(), rtol=1e-4, atol=0)
    for name, p in stage.parameters().items():
        torch.testing.assert_close(got[name], p.grad, rtol=2e-3, atol=1e-5)


def test_linear_target_compares_the_linear_half_alone(
    make_student: Students, tokens: Tokens, record_calls: Callable[..., Any]
) -> None:
    student, ids = make_student(window=5), tokens(2, 14)
    got = TransferStage(student, config(target="linear")).validate(plain_batch(ids))["layers"]
    for i, (layer, call, teacher) in enumerate(record_calls(student, ids)):
        phi_q, phi_k = layer.mixer.feature_q(call.q), layer.mixer.feature_k(call.k)
        scores = (phi_q @ phi_k.mT).tril()  # the scale of phi_q cancels
        out = scores @ call.v.repeat_interleave(3, 1) / scores.sum(-1, keepdim=True)
        torch.testing.assert_close(got[i], torch.nn.functional.mse_loss(out, teacher), rtol=1e-4, atol=0)


@pytest.mark.parametrize("factors", [{}, {"mse_factor": 0.0, "xent_factor": 1.0}], ids=str)
@pytest.mark.parametrize("layers", ["all", [0, 2]])
def test_packed_documents_are_compared_apart(
    make_student: Students, packed: Callable[..., Any], tokens: Tokens, factors: dict[str, Any], layers: Any
) -> None:
    ids = tokens(1, 20)
    stage = TransferStage(make_student(window=4, sinks=2, layers=layers), config(**factors))
    together = stage.validate(batch_of(packed, ids, [[0] * 7 + [1] * 13]))["loss"]
    alone = [stage.validate(plain_batch(part))["loss"] for part in ids.split([7, 13], 1)]
    torch.testing.assert_close(together, (7 * alone[0] + 13 * alone[1]) / 20, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factors", [{}, {"mse_factor": 0.0, "xent_factor": 1.0}], ids=str)
@pytest.mark.parametrize("layers", ["all", [0, 2]])
def test_padding_does_not_count(
    make_student: Students, packed: Callable[..., Any], tokens: Tokens, factors: dict[str, Any], layers: Any
) -> None:
    ids = tokens(1, 20)
    stage = TransferStage(make_student(window=4, layers=layers), config(**factors))
    padded = stage.validate(batch_of(packed, ids, [[0] * 12 + [-1] * 8]))["loss"]
    torch.testing.assert_close(padded, stage.validate(plain_batch(ids[:, :12]))["loss"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_micro_batches_give_the_same_training(make_student: Students, training_data: TrainingData) -> None:
    whole, parts = make_student(window=4), make_student(window=4)
    transfer_attention(whole, training_data, config())
    transfer_attention(parts, training_data, config(micro_batch_size=1))
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_mixed_precision_keeps_float32_parameters(make_student: Students, training_data: TrainingData) -> None:
    full, mixed = make_student(window=4), make_student(window=4)
    a = transfer_attention(full, training_data, config())
    b = transfer_attention(mixed, training_data, config(), autocast=torch.bfloat16)
    assert b.best_loss == pytest.approx(a.best_loss, rel=0.1)
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}


def test_a_bfloat16_model_is_trained_in_float32(
    make_student: Students, training_data: TrainingData, teacher: Any
) -> None:
    student = make_student(teacher.to(torch.bfloat16), window=4)
    before = copy.deepcopy(student)
    transfer_attention(student, training_data, config(), autocast=torch.bfloat16)
    for layer, old in zip(linearized_layers(student), linearized_layers(before), strict=True):
        for name, p in layer.mixer.named_parameters():
            assert p.dtype == torch.float32
            assert not torch.equal(p, old.mixer.get_parameter(name)), name


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(make_student: Students, training_data: TrainingData) -> None:
    students = [make_student(window=4) for _ in range(3)]
    for student, seed in zip(students, (3, 3, 4), strict=True):
        transfer_attention(student, training_data, config(), seed=seed)
    first, same, other = ([p.clone() for p in s.parameters()] for s in students)
    assert all(torch.equal(p, q) for p, q in zip(first, same, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(first, other, strict=True))


def test_a_model_that_is_not_converted_is_refused(teacher: LlamaForCausalLM, training_data: TrainingData) -> None:
    with pytest.raises(LolcatsError, match=r"call lolcats\.convert first"):
        transfer_attention(teacher, training_data, config())


def test_a_loss_that_is_not_finite_names_step_and_layer(make_student: Students, training_data: TrainingData) -> None:
    student: Any = make_student(window=4)
    with torch.no_grad():
        student.model.layers[1].self_attn.mixer.feature_k.weight[0, 0, 0] = torch.nan
    with pytest.raises(LolcatsError, match=r"transfer: .*nan.* at step 1, first in .*layers?[ .]1"):
        transfer_attention(student, training_data, config())
