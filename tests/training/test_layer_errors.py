"""Stage 2 trained on the error of the layers' attention: its formula, its gradients, and what it goes with."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lolcats import LolcatsError
from lolcats.config import FinetuneConfig, RunConfig
from lolcats.modeling import linearized_layers
from lolcats.training import FinetuneStage, Reporter, TrainingData, finetune_lora
from lolcats.training.batches import Batch, make_batch
from lolcats.training.layer_errors import attention_outputs
from lolcats.training.losses import shifted_labels
from lolcats.training.window_control import WindowStage

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]
LAYERS: list[dict[str, Any]] = [
    {"window": 4, "sinks": 1, "layers": [0, 2]},
    {"mixer": "blend", "window": 4, "sinks": 2, "kept": {"pairs": 3}},
]


def config(**changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {"tokens": 20 * 4 * 3, "batch_size": 4, "warmup_steps": 1, "lr": 1e-2, "rank": 2}
    settings |= {"cross_entropy_factor": 0.0, "error_factor": 3.0, "targets": "all"}
    return FinetuneConfig(**(settings | changes))


def batch_of(ids: Tensor, **changes: Any) -> Batch:
    settings: dict[str, Any] = {"loss_mask": torch.ones_like(ids, dtype=torch.bool), "document": None}
    settings |= {"position_ids": None, **changes}
    return Batch(ids, **settings)


def stir(model: Any) -> None:
    """Give the second LoRA matrices, which start at zero, some weight."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


@contextmanager
def attended(model: Any, layers: list[int]) -> Any:
    """Inside, what reaches the output projection of layers is put into the list: attention outputs [B, N, H Dv]."""
    found: list[Tensor] = []
    attentions = [getattr(layer.self_attn, "inner", layer.self_attn) for layer in model.model.layers]
    hooks = [
        attentions[n].o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0])) for n in layers
    ]  # fmt: skip
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def plain_errors(student: Any, teacher: Any, ids: Tensor, weights: Tensor, **inputs: Any) -> Tensor:
    """The error of each linearized layer, from the inputs of the output projections alone."""
    layers = [layer.layer_idx for layer in linearized_layers(student)]
    with attended(student, layers) as mine:
        student(ids, use_cache=False, **inputs)
    with torch.no_grad(), attended(teacher, layers) as its:
        teacher(ids, use_cache=False, **inputs)
    at_tokens = [(x - y).square().mean(-1) for x, y in zip(mine, its, strict=True)]
    return torch.stack([(error * weights).sum() / weights.sum() for error in at_tokens])


def all_but_last(ids: Tensor) -> Tensor:
    weights = torch.ones_like(ids, dtype=torch.float64)
    weights[:, -1] = 0
    return weights


@pytest.mark.parametrize("settings", LAYERS, ids=["hybrid", "blend"])
def test_gradients_are_those_of_a_plain_float64_loss(
    make_student: Students, teacher: Any, tokens: Tokens, settings: dict[str, Any]
) -> None:
    student, ids = make_student(**settings), tokens()
    stage = FinetuneStage(student, config(train_feature_maps=True))
    stir(student)
    exact = copy.deepcopy(student).double()
    metrics = stage.backward(batch_of(ids), 0.5)
    errors = plain_errors(exact, teacher.double(), ids, all_but_last(ids))
    (0.5 * 3.0 * errors.mean()).backward()
    torch.testing.assert_close(metrics["layers"].double(), errors.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["loss"].double(), 3.0 * errors.mean().detach(), rtol=1e-4, atol=1e-6)
    expected = {name: p.grad for name, p in exact.named_parameters()}
    learned = 0
    for name, p in stage.parameters().items():
        if p.grad is None:  # what chooses the kept pairs does so without a gradient
            assert expected[name] is None and ".score." in name
            continue
        wanted = torch.zeros_like(p) if expected[name] is None else expected[name].float()
        learned += int(bool(wanted.any()))
        torch.testing.assert_close(p.grad, wanted, rtol=2e-3, atol=1e-5, msg=name)
    assert learned > 20


@pytest.mark.parametrize("kl_factor", [0.0, 2.0])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_losses_add_up(make_student: Students, teacher: Any, tokens: Tokens, kl_factor: float, method: Any) -> None:
    student, ids = make_student(window=4), tokens()
    stage = FinetuneStage(student, config(cross_entropy_factor=0.5, kl_factor=kl_factor, method=method))
    with torch.no_grad():
        for p in stage.parameters().values():
            p.add_(0.05)
    with torch.no_grad():
        got = stage.validate(batch_of(ids))
    error = plain_errors(copy.deepcopy(student), teacher, ids, all_but_last(ids).float()).mean().detach()
    torch.testing.assert_close(got["error"], error, rtol=1e-4, atol=1e-6)
    other = {"cross_entropy": 0.5, "kl": kl_factor, "error": 3.0}
    total = sum(float(value) * other[name] for name, value in got.items() if name in other)
    assert float(got["loss"]) == pytest.approx(total, rel=1e-5)
    assert ("kl" in got) is (kl_factor > 0)
    assert all(layer.listener is None for layer in linearized_layers(student))


def test_alone_it_leaves_the_head_out_of_the_gradient(make_student: Students, tokens: Tokens) -> None:
    """What comes after the last attention cannot change the error, and has the gradient 0."""
    stage = FinetuneStage(make_student(window=4), config())
    stir(stage.model)
    metrics = stage.backward(batch_of(tokens()), 1.0)
    after = [p.grad for n, p in stage.parameters().items() if "layers.2.mlp" in n or "layers.2.self_attn.inner.o" in n]
    assert len(after) == 8 and all(grad is not None and not bool(grad.any()) for grad in after)
    with torch.no_grad():
        expected = stage.model(tokens(), labels=tokens()).loss
    torch.testing.assert_close(metrics["cross_entropy"], expected)


@pytest.mark.parametrize("kl_factor", [0.0, 2.0])
def test_recomputed_layers_give_the_same_gradients(make_student: Students, tokens: Tokens, kl_factor: float) -> None:
    grads = []
    for twice in (False, True):
        torch.manual_seed(0)
        stage = FinetuneStage(make_student(window=4), config(kl_factor=kl_factor, gradient_checkpointing=twice))
        stir(stage.model)
        stage.backward(batch_of(tokens()), 1.0)
        grads.append({name: p.grad for name, p in stage.parameters().items()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


@pytest.mark.parametrize("changes", [{}, {"mask_prompt": True}, {"near_weight": 0.25}, {"near_weight": 0.0}], ids=str)
def test_micro_batches_are_the_batch(
    make_student: Students, packed: Callable[..., Any], tokens: Tokens, changes: dict[str, Any]
) -> None:
    """With documents, padding, prompts left out, and tokens that weigh less."""
    ids = tokens(4, 20)
    document = np.array([[0] * 7 + [1] * 9 + [-1] * 4, [0] * 20, [0] * 12 + [-1] * 8, [0] * 3 + [1] * 17])
    mask = np.arange(20)[None].repeat(4, 0) >= np.array([[4], [11], [2], [15]])
    data = packed(ids.numpy(), document, mask)
    torch.manual_seed(0)
    stage = FinetuneStage(make_student(window=4), config(kl_factor=1.0, **changes))
    stir(stage.model)
    found = []
    for size in (4, 1):
        batches = [make_batch(data, rows, "cpu", True) for rows in np.arange(4).reshape(-1, size)]
        counts = [stage.count(batch) for batch in batches]
        metrics = [
            {name: value * count / sum(counts) for name, value in stage.backward(batch, count / sum(counts)).items()}
            for batch, count in zip(batches, counts, strict=True)
        ]
        found.append(({n: p.grad for n, p in stage.parameters().items()}, metrics))
        for p in stage.parameters().values():
            p.grad = None
    torch.testing.assert_close(found[0][1][0]["error"], sum(m["error"] for m in found[1][1]), rtol=1e-4, atol=1e-6)
    for name, grad in found[0][0].items():
        torch.testing.assert_close(grad, found[1][0][name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_weights_are_those_of_the_other_losses(make_student: Students, teacher: Any, tokens: Tokens) -> None:
    ids = tokens(2, 20)
    mask = torch.arange(20)[None] >= torch.tensor([[6], [15]])
    stage = FinetuneStage(make_student(window=4), config(mask_prompt=True, near_weight=0.5))
    labels = shifted_labels(ids, mask, None)
    weights = (labels != -100) * torch.where(torch.arange(20) < 4, 0.5, 1.0)
    expected = plain_errors(copy.deepcopy(stage.model), teacher, ids, weights).detach()
    torch.testing.assert_close(
        stage.validate(batch_of(ids, loss_mask=mask))["layers"], expected, rtol=1e-4, atol=1e-6
    )  # fmt: skip


def test_parts_of_long_texts_give_the_error_of_the_whole(make_student: Students, tokens: Tokens) -> None:
    changes = {"passing": {"share": 1.0, "chunks": 2}, "gradient_checkpointing": True}
    stage = FinetuneStage(make_student(window=4), config(**changes))
    stir(stage.model)
    ids = tokens(2, 28)
    whole, parts = stage.validate(batch_of(ids)), stage.backward(batch_of(ids, chunk=7), 1.0)
    for name in ("loss", "error", "layers", "cross_entropy"):
        torch.testing.assert_close(parts[name], whole[name], rtol=2e-4, atol=1e-5, msg=name)
    assert all(p.grad is not None for p in stage.parameters().values())


def test_the_trained_window_is_compared_too(make_student: Students, tokens: Tokens) -> None:
    stage = WindowStage(make_student(window=4), config())
    metrics = stage.backward(batch_of(tokens()), 1.0)
    assert float(metrics["error"]) > 0 and all(p.grad is not None for p in stage.parameters().values())


def test_a_layer_that_runs_twice_is_refused(make_student: Students, tokens: Tokens) -> None:
    student = make_student(window=4)
    with attention_outputs(student) as kept:
        student(tokens())
        assert sorted(kept) == [0, 1, 2] and kept[0].shape == (2, 6, 24, 6)
        with pytest.raises(LolcatsError, match=r"layer 0 is run several times in one pass.*error_factor=0"):
            student(tokens())


@pytest.mark.slow
def test_it_is_learned(make_student: Students, training_data: TrainingData, tmp_path: Path) -> None:
    data = TrainingData(training_data.train, training_data.train)
    changes: dict[str, Any] = {"tokens": 20 * 4 * 8, "validate_every": 4, "micro_batch_size": 2}
    changes |= {"train_feature_maps": True, "lr": 2e-2, "rank": 8}
    torch.manual_seed(0)
    result, _ = finetune_lora(make_student(window=4), data, config(**changes), reporter=Reporter(tmp_path / "m.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    validations = [line for line in lines if "validation_error" in line]
    assert validations[-1]["validation_error"] < 0.95 * next(line["error"] for line in lines)
    assert result.best_loss == pytest.approx(3 * min(line["validation_error"] for line in validations), rel=1e-5)
    layers = validations[-1]["validation_layers"]
    assert len(layers) == 3 and np.mean(layers) == pytest.approx(validations[-1]["validation_error"], rel=1e-5)


@pytest.mark.parametrize(
    ("finetune", "message"),
    [
        ({"cross_entropy_factor": 0.0}, "cross_entropy_factor, kl_factor and error_factor are all 0"),
        ({"error_factor": 1.0, "kl_factor": 1.0, "teacher_logits": {"cache": "topk"}}, "set error_factor to 0, or"),
        ({"error_factor": 1.0, "method": "full", "sharding": {"enabled": True}}, "set kl_factor to 0 and error_f"),
    ],
)
def test_settings_that_exclude_each_other(finetune: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(finetune=finetune)  # type: ignore[arg-type]


def test_its_steps_are_no_cuda_graphs() -> None:
    """Its differences are made once more on the way back."""
    assert FinetuneConfig().records_steps and not config().records_steps
