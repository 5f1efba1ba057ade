"""The loop that both stages share: order of the data, schedules, the best checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lolcats import LolcatsError
from lolcats.config import OptimConfig
from lolcats.training import (
    Reporter,
    TrainingData,
    TrainResult,
    checkpoint,
    train,
)
from lolcats.training.batches import Batch, make_batch, step_rows
from lolcats.training.schedule import Schedule

Students = Callable[..., Any]


class Scripted:
    """A stage of one number: its gradient is 1, and its validation losses are given."""

    name = section = "scripted"

    def __init__(self, losses: list[float]) -> None:
        self.number = nn.Parameter(torch.zeros(1))
        self.losses = iter(losses)
        self.batches: list[Tensor] = []

    def origin(self) -> dict[str, Any]:
        return {"linearization": {}, "weights": ""}

    def windowed(self, window: int | None) -> AbstractContextManager[None]:
        return nullcontext()

    def count(self, batch: Batch) -> int:
        return batch.tokens

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"number": self.number}

    def backward(self, batch: Batch, share: float) -> dict[str, Tensor]:
        self.batches.append(batch.input_ids)
        self.number.grad = torch.ones(1)
        return {"loss": torch.ones(())}

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": torch.tensor(next(self.losses))}

    def where(self, metrics: Mapping[str, Tensor]) -> str:
        return ""


def run(
    stage: Any, config: OptimConfig, data: TrainingData, folder: Path, reporter: Reporter | None = None
) -> TrainResult:
    return train(stage, config, data, folder, reporter or Reporter(), accelerator=Accelerator(cpu=True), seed=0)


def optim(**changes: Any) -> OptimConfig:
    settings: dict[str, Any] = {
        "tokens": 20 * 3 * 6, "batch_size": 3, "lr": 1.0, "warmup_steps": 0, "validate_every": 1,
        "schedule": "constant",
    }  # fmt: skip
    return OptimConfig(**(settings | changes))


# ---- order of the data


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (7, 7), (5, 12), (9, 1)])
def test_each_epoch_reads_each_sequence_once(size: int, batch_size: int) -> None:
    steps = -(-3 * size // batch_size)
    rows = np.concatenate([step_rows(size, step, batch_size, seed=5) for step in range(steps)])
    epochs = [rows[i * size : (i + 1) * size] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    if size > 1:
        assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(
        rows[:size], np.concatenate([step_rows(size, s, batch_size, 6) for s in range(steps)])[:size]
    )


def test_the_loop_reads_the_rows_of_the_seed(training_data: TrainingData, tmp_path: Path) -> None:
    stage = Scripted([1.0] * 10)
    run(stage, optim(), training_data, tmp_path)
    expected = [training_data.train.ids[step_rows(10, step, 3, 0)] for step in range(6)]
    assert all(np.array_equal(got.numpy(), want) for got, want in zip(stage.batches, expected, strict=True))


def test_positions_start_again_at_each_document(packed: Callable[..., Any]) -> None:
    data = packed(np.arange(16).reshape(2, 8), np.array([[0, 0, 0, 1, 1, 2, -1, -1], [0] * 8]))
    batch = make_batch(data, np.array([1, 0]), "cpu", keep_apart=True)
    assert batch.position_ids is not None and batch.document is not None
    assert batch.input_ids[1].tolist() == list(range(8))
    assert batch.position_ids.tolist() == [list(range(8)), [0, 1, 2, 0, 1, 0, 0, 1]]
    assert batch.document[1].tolist() == [0, 0, 0, 1, 1, 2, -1, -1]
    assert make_batch(data, np.array([0]), "cpu", keep_apart=False).position_ids is None


# ---- schedules


def test_cosine_ends_at_its_share() -> None:
    schedule = Schedule(optim(schedule="cosine", lr=0.5, final_lr=0.2, warmup_steps=10), 110)
    assert schedule.lr(0) == pytest.approx(0.05)
    assert schedule.lr(9) == pytest.approx(0.5)
    assert schedule.lr(10) == pytest.approx(0.5)
    assert schedule.lr(60) == pytest.approx(0.5 * (0.2 + 0.8 / 2))
    assert schedule.lr(110) == pytest.approx(0.1)
    rates = [schedule.lr(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_linear_ends_at_its_share() -> None:
    schedule = Schedule(optim(schedule="linear", lr=1.0, final_lr=0.1, warmup_steps=0), 90)
    assert [schedule.lr(step) for step in (0, 45, 90)] == pytest.approx([1.0, 0.55, 0.1])


def test_plateau_waits_for_its_patience() -> None:
    config = optim(schedule="plateau", plateau_factor=0.1, plateau_patience=2)
    schedule = Schedule(config, 100)
    rates = []
    for value in (1.0, 0.9, 0.9, 0.95, 0.9, 0.9, 0.8, 0.9, 0.9, 0.9):
        schedule.observe(value)
        rates.append(schedule.lr(50))
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.01])
    other = Schedule(config, 100)
    other.restore(json.loads(json.dumps(schedule.state())))
    assert other.state() == schedule.state()


def test_plateau_agrees_with_torch() -> None:
    generator = np.random.default_rng(0)
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    schedule = Schedule(optim(schedule="plateau", plateau_factor=0.5, plateau_patience=1), 100)
    for value in generator.random(40):
        reference.step(value)
        schedule.observe(float(value))
        assert schedule.lr(0) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_the_loop_uses_the_schedule(training_data: TrainingData, tmp_path: Path) -> None:
    config = optim(schedule="plateau", plateau_patience=0)
    run(Scripted([2.0, 2.0, 1.0, 1.0, 1.0, 1.0]), config, training_data, tmp_path, Reporter(tmp_path / "m.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if "lr" in line] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.001])


# ---- the best checkpoint


def test_the_best_weights_stay_in_the_model(training_data: TrainingData, tmp_path: Path) -> None:
    stage = Scripted([5.0, 3.0, 4.0, 2.0, 2.5, 9.0])
    result = run(stage, optim(lr=0.5), training_data, tmp_path)
    assert (result.steps, result.best_step, result.best_loss) == (6, 4, 2.0)
    assert result.tokens == 6 * 3 * 20
    assert float(stage.number.detach()) == pytest.approx(
        -0.5 * 4, rel=1e-4
    )  # AdamW moves by lr where all gradients agree
    held, _ = checkpoint.load_tensors(tmp_path / "last.safetensors")
    assert float(held["parameter:number"]) == pytest.approx(-0.5 * 6, rel=1e-4)


def test_large_gradients_are_clipped(training_data: TrainingData, tmp_path: Path) -> None:
    seen: list[float] = []

    class Steep(Scripted):
        def backward(self, batch: Batch, share: float) -> dict[str, Tensor]:
            if self.number.grad is not None:
                seen.append(float(self.number.grad))
            self.number.grad = torch.full((1,), 50.0)
            return {"loss": torch.ones(())}

    stage = Steep([1.0] * 6)
    path = tmp_path / "m.jsonl"
    run(stage, optim(clip=0.25), training_data, tmp_path, Reporter(path))
    first = json.loads(path.read_text().splitlines()[0])
    assert first["gradient_norm"] == pytest.approx(50.0)
    held, _ = checkpoint.load_tensors(tmp_path / "last.safetensors")
    assert float(held["optimizer:exp_avg:number"]) == pytest.approx(0.25 * (1 - 0.9**6), rel=1e-3)
    assert seen == []  # gradients are cleared after each step


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_loss_stops_before_the_weights_change(
    training_data: TrainingData, tmp_path: Path, value: float
) -> None:
    class Broken(Scripted):
        def backward(self, batch: Batch, share: float) -> dict[str, Tensor]:
            super().backward(batch, share)
            return {"loss": torch.tensor(value if len(self.batches) == 4 else 1.0)}

    stage = Broken([1.0] * 10)
    with pytest.raises(LolcatsError, match=f"scripted: the loss is {value} .* at step 4"):
        run(stage, optim(checkpoint_every=2), training_data, tmp_path)
    assert float(stage.number.detach()) == pytest.approx(-3.0, rel=1e-4)
    assert checkpoint.load_tensors(tmp_path / "last.safetensors")[1]["step"] == 2
