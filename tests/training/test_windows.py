"""Windows that are another in each step: who chooses them, who has them, and that they are taken back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats.config import FinetuneConfig, OptimConfig, TransferConfig
from lolcats.modeling import linearized_layers
from lolcats.training import FinetuneStage, TrainingData, TransferStage, finetune_lora, transfer_attention
from lolcats.training import loop as loop_module
from lolcats.training.batches import Batch
from lolcats.training.graphs import GraphedStage
from lolcats.training.windows import OWN_KEY, step_window

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]
LAYERS: list[dict[str, Any]] = [
    {"sinks": 1},
    {"window_kind": "terraced"},
    {"mixer": "blend", "sinks": 1, "kept": {"pairs": 2}},
]


def transfer(**changes: Any) -> TransferConfig:
    settings: dict[str, Any] = {"tokens": 20 * 4 * 6, "batch_size": 4, "warmup_steps": 0, "checkpoint_every": 2}
    return TransferConfig(**(settings | changes))


def finetune(**changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {"tokens": 20 * 4 * 3, "batch_size": 4, "warmup_steps": 0, "rank": 2, "kl_factor": 1.0}
    return FinetuneConfig(**(settings | changes))


def batch_of(ids: Tensor) -> Batch:
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), None, None)


def draws(config: OptimConfig, seed: int = 0, steps: int = 300) -> list[int | None]:
    return [step_window(config, seed, step, steps) for step in range(steps)]


def test_windows_are_multiples_of_16_in_the_range_and_the_same_again() -> None:
    config = transfer(random_window=[20, 100])
    found = draws(config)
    assert set(found) == {32, 48, 64, 80, 96}
    assert found == draws(config) and found != draws(config, seed=1)
    assert all(40 < found.count(window) < 80 for window in set(found))


def test_without_the_options_no_window_is_chosen() -> None:
    assert set(draws(transfer())) == {None}
    assert not transfer(window_dropout=[0.0, 0.0]).varies_window


@pytest.mark.parametrize(("more", "otherwise"), [({}, {None}), ({"random_window": [16, 32]}, {16, 32})], ids=str)
def test_dropout_follows_its_schedule(more: dict[str, Any], otherwise: set[int | None]) -> None:
    found = draws(transfer(window_dropout=[1.0, 0.5, 0.0], **more))
    assert set(found[:100]) == {OWN_KEY}
    assert 30 < found[100:200].count(OWN_KEY) < 70
    assert set(found[200:]) == otherwise


@pytest.mark.parametrize("settings", LAYERS, ids=str)
@pytest.mark.parametrize("window", [1, 7])
def test_a_step_is_that_of_layers_with_the_window(
    make_student: Students, tokens: Tokens, settings: dict[str, Any], window: int
) -> None:
    """In both stages, values and gradients; but the learned score goes on being taught with the layer's own window."""
    ids = batch_of(tokens(2, 20))
    for make in (
        lambda student: TransferStage(student, transfer()),
        lambda student: FinetuneStage(student, finetune()),
    ):
        torch.manual_seed(0)
        changed = make(make_student(window=4, **settings))
        torch.manual_seed(0)
        other = make(make_student(window=window, **settings))
        with changed.windowed(window):
            found = changed.backward(ids, 1.0)
        expected = other.backward(ids, 1.0)
        key = "mse" if "mse" in found else "loss"
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=0)
        for (name, p), q in zip(changed.parameters().items(), other.parameters().values(), strict=True):
            if p.grad is not None and "score" not in name:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        assert float(changed.validate(ids)[key].detach()) != float(found[key].detach())


def test_a_learned_score_is_taught_with_the_layers_own_window(make_student: Students, tokens: Tokens) -> None:
    gradients = []
    for window in (None, 9):
        torch.manual_seed(0)
        stage = TransferStage(make_student(mixer="blend", window=4, kept={"pairs": 2}), transfer())
        with stage.windowed(window):
            stage.backward(batch_of(tokens(2, 20)), 1.0)
        gradients.append({n: p.grad for n, p in stage.parameters().items() if "score" in n})
    assert gradients[0]
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][name])


@pytest.mark.parametrize("kind", ["transfer", "finetune"])
def test_windows_are_taken_back_also_after_errors(make_student: Students, kind: str) -> None:
    student = make_student(window=4)
    stage: Any = TransferStage(student, transfer()) if kind == "transfer" else FinetuneStage(student, finetune())
    for outer in (stage, GraphedStage(stage)):
        with pytest.raises(ZeroDivisionError), outer.windowed(9):
            for layer in linearized_layers(student):
                with layer.mixer.windowed(9):
                    assert layer.mixer.settings.window == 9
            raise ZeroDivisionError
        assert {layer.mixer.settings.window for layer in linearized_layers(student)} == {4}
    assert getattr(stage, "window", None) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transfer", "finetune"])
def test_a_resumed_stage_has_the_windows_of_an_undisturbed_one(
    make_student: Students, training_data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options: dict[str, Any] = {"random_window": [16, 16], "window_dropout": [0.8, 0.2], "checkpoint_every": 2}
    seen: list[int | None] = []
    cuts = [4]

    def noted(config: OptimConfig, seed: int, step: int, steps: int) -> int | None:
        if step in cuts:
            raise ZeroDivisionError(cuts.pop())
        seen.append(step_window(config, seed, step, steps))
        return seen[-1]

    def run(folder: Path) -> dict[str, Tensor]:
        torch.manual_seed(0)
        student = make_student(window=4)
        if kind == "transfer":
            transfer_attention(student, training_data, transfer(**options), folder=folder)
        else:
            finetune_lora(student, training_data, finetune(tokens=20 * 4 * 6, **options), folder=folder)
        return student.state_dict()

    whole = run(tmp_path / "whole")
    monkeypatch.setattr(loop_module, "step_window", noted)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "cut")
    cut = run(tmp_path / "cut")
    assert len(seen) == 6 and set(seen[:4]) == set(seen[4:]) == {OWN_KEY, 16}
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
