"""Stage 2 where tokens that see their whole text in window and sinks weigh less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from lolcats.config import FinetuneConfig
from lolcats.modeling import linearized_layers
from lolcats.training import FinetuneStage, TrainingData, finetune_lora, losses
from lolcats.training.batches import Batch, make_batch

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]
FACTORS = {"cross_entropy_factor": 0.5, "kl_factor": 2.0}


def config(**changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {"tokens": 20 * 4, "batch_size": 4, "warmup_steps": 0, "lr": 1e-2, "rank": 2}
    return FinetuneConfig(**(settings | changes))


def batch_of(ids: Tensor, loss_mask: Tensor | None = None) -> Batch:
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool) if loss_mask is None else loss_mask, None, None)


def token_losses(student: Any, teacher: Any, ids: Tensor) -> Tensor:
    """0.5 cross-entropy + 2 KL of each token [B, N - 1]."""
    log_s, log_t = (m(ids).logits[:, :-1].log_softmax(-1) for m in (student, teacher))
    cross = nnf.nll_loss(log_s.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    return 0.5 * cross + 2 * (log_t.exp() * (log_t - log_s)).sum(-1)


@pytest.mark.parametrize(
    ("layer", "first"),
    [
        ({"window": 5, "sinks": 2}, 7),
        ({"window": 4, "window_kind": "terraced", "sinks": 1}, 8),
        ({"mixer": "blend", "window": 6, "sinks": 3}, 9),
    ],
    ids=str,
)
@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_loss_is_the_weighted_mean(
    make_student: Students, teacher: Any, tokens: Tokens, layer: dict[str, Any], first: int, weight: float
) -> None:
    student, ids = make_student(**layer), tokens(2, 20)
    stage = FinetuneStage(student, config(near_weight=weight, **FACTORS))
    with torch.no_grad():
        each = token_losses(student, teacher, ids)
    weights = torch.where(torch.arange(19) < first, weight, 1.0).expand_as(each)
    found = stage.validate(batch_of(ids))["loss"]
    torch.testing.assert_close(found.detach(), (each * weights).sum() / weights.sum(), rtol=1e-4, atol=1e-5)
    assert stage.count(batch_of(ids)) == pytest.approx(float(weights.sum()))


def test_the_first_token_that_counts_is_the_first_with_something_far(make_student: Students, tokens: Tokens) -> None:
    """Up to it the layer is exact whatever its linear half is; there it is not."""
    ids = tokens(1, 30)
    for layer in ({"window": 5, "sinks": 2}, {"window": 4, "window_kind": "terraced", "sinks": 1},
                  {"window": 3, "window_kind": "terraced", "sinks": 6}):  # fmt: skip
        student = make_student(**layer)
        first = linearized_layers(student)[0].mixer.near_tokens
        with torch.no_grad():
            before = student(ids).logits
            for part in linearized_layers(student):
                part.mixer.query_scale.add_(2.0)  # type: ignore[operator]
            after = student(ids).logits
        same = (before - after).abs().amax(-1)[0] < 1e-5
        assert bool(same[:first].all()) and not bool(same[first])


@pytest.mark.parametrize("packing", [False, True], ids=["stream", "documents"])
def test_weight_0_gives_early_tokens_no_gradient_at_all(
    make_student: Students, packed: Callable[..., Any], tokens: Tokens, packing: bool
) -> None:
    """By the gradient that reaches the last hidden states: exactly 0 there, and not 0 elsewhere."""
    stage = FinetuneStage(make_student(window=5, sinks=2), config(near_weight=0.0, kl_factor=1.0))
    seen: list[Tensor] = []
    plain = stage.head.hidden

    def watched(**inputs: Any) -> Tensor:
        hidden = plain(**inputs)
        if hidden.requires_grad:
            hidden.register_hook(seen.append)
        return hidden

    stage.head.hidden = watched  # type: ignore[method-assign]
    document = np.array([[0] * 11 + [1] * 16 + [-1] * 3])
    stage.backward(make_batch(packed(tokens(1, 30).numpy(), document), np.arange(1), "cpu", packing), 1.0)
    learns = seen[0][0].abs().amax(-1) > 0
    expected = [*range(7, 10), *range(18, 26)] if packing else list(range(7, 29))
    assert learns.nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_texts_shorter_than_the_window_teach_little_or_nothing(
    make_student: Students, tokens: Tokens, weight: float
) -> None:
    stage = FinetuneStage(make_student(window=40), config(near_weight=weight))
    loss = stage.backward(batch_of(tokens(2, 20)), 1.0)["loss"]
    moved = [bool(p.grad.any()) for p in stage.parameters().values() if p.grad is not None]
    assert any(moved) == (weight > 0) and (float(loss) > 0) == (weight > 0)
    assert stage.count(batch_of(tokens(2, 20))) == 38 * weight


def test_prompts_and_weights_together(make_student: Students, teacher: Any, tokens: Tokens) -> None:
    student, ids = make_student(window=5), tokens(2, 20)
    mask = torch.arange(20)[None] >= torch.tensor([[3], [15]])
    stage = FinetuneStage(student, config(near_weight=0.5, mask_prompt=True, **FACTORS))
    with torch.no_grad():
        each = token_losses(student, teacher, ids)
    weights = torch.where(torch.arange(19) < 5, 0.5, 1.0) * mask[:, 1:]
    found = stage.validate(batch_of(ids, mask))["loss"]
    torch.testing.assert_close(found.detach(), (each * weights).sum() / weights.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trained_head", [False, True])
def test_chunks_give_the_gradient_of_the_whole(
    make_student: Students, teacher: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, trained_head: bool
) -> None:
    monkeypatch.setattr(losses, "HEAD_CHUNK", 7)
    student, ids = make_student(window=5), tokens(2, 20)
    method = "full" if trained_head else "lora"
    stage = FinetuneStage(student, config(near_weight=0.25, method=method, **FACTORS))
    stage.backward(batch_of(ids), 0.5)
    got = {name: p.grad for name, p in stage.parameters().items()}
    for p in student.parameters():
        p.grad = None
    weights = torch.where(torch.arange(19) < 5, 0.25, 1.0).expand(2, -1)
    (0.5 * (token_losses(student, teacher, ids) * weights).sum() / weights.sum()).backward()
    for name, p in stage.parameters().items():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-5)


def test_the_window_of_the_step_counts(make_student: Students, tokens: Tokens) -> None:
    stage = FinetuneStage(make_student(window=5, sinks=1), config(near_weight=0.0))
    with stage.windowed(10):
        assert stage.count(batch_of(tokens(1, 20))) == 19 - 11
    assert stage.count(batch_of(tokens(1, 20))) == 19 - 6


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["stream", "prompts", "documents"])
def test_micro_batches_give_the_same_gradient(
    make_student: Students, packed: Callable[..., Any], tokens: Tokens, kind: str, weight: float
) -> None:
    ids = tokens(4, 20).numpy()
    mask = np.arange(20)[None] >= np.array([[2], [5], [12], [18]])
    document = np.where(np.arange(20)[None] < np.array([[20], [15], [9], [4]]), 0, -1)
    data = {
        "stream": packed(ids),
        "prompts": packed(ids, loss_mask=mask),
        "documents": packed(ids, document),
    }[kind]
    trained = []
    for size in (4, 1):
        torch.manual_seed(0)
        student = make_student(window=4)
        settings = config(tokens=80, micro_batch_size=size, mask_prompt=kind == "prompts", near_weight=weight)
        result, _ = finetune_lora(student, TrainingData(data, data, kind == "documents"), settings)
        trained.append((student, result.best_loss))
    assert trained[0][1] == pytest.approx(trained[1][1], rel=1e-4)
    for p, q in zip(trained[0][0].parameters(), trained[1][0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
