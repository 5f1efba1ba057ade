"""lora.jsonl: sizes of updates from the factors alone, errors of layers, and a file that a kill leaves right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from killing import Killed, Killer
from lolcats.config import FinetuneConfig
from lolcats.training import FinetuneStage, Reporter, TrainingData, finetune_lora
from lolcats.training.batches import make_batch
from lolcats.training.dynamics import SEQUENCES, Dynamics, update_sizes
from lolcats.training.window_control import WindowStage

Students = Callable[..., Any]
STEPS = 9


def config(**changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {"tokens": 20 * 4 * STEPS, "batch_size": 4, "warmup_steps": 1, "lr": 1e-2, "rank": 2}
    settings |= {"validate_every": 4, "checkpoint_every": 3, "kl_factor": 1.0, "dropout": 0.2}
    return FinetuneConfig(**(settings | changes))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def finetune(student: Any, data: TrainingData, folder: Path, reporter: Reporter, **changes: Any) -> Any:
    folder.mkdir(exist_ok=True)
    student.train()  # for the dropout of the adapters, which draws random numbers
    return finetune_lora(student, data, config(**changes), folder=folder / "checkpoints", reporter=reporter)[1]


# ---- sizes


@pytest.mark.parametrize("rank", [1, 8, 30])
def test_sizes_are_those_of_the_product(make_student: Students, rank: int) -> None:
    """Of all modules; 30 is more than the smaller side of some. One update is 0 and one of rank 1."""
    stage = FinetuneStage(make_student(window=4, layers=[0, 2]), config(rank=rank, alpha=12.0, targets="all"))
    found = update_sizes(stage.model)
    assert set(found.values()) == {(0.0, 0.0)}
    generator = torch.Generator().manual_seed(3)
    modules: dict[str, Any] = {n: m for n, m in stage.model.named_modules() if hasattr(m, "lora_A")}
    for name, module in modules.items():
        up: Tensor = module.lora_B["default"].weight.data
        up.copy_(torch.randn(up.shape, generator=generator))
        if name.endswith("1.mlp.up_proj"):
            up[:, 1:] = 0
        if name.endswith("1.mlp.down_proj"):
            up.zero_()
    found = update_sizes(stage.model)
    assert len(found) == len(modules) == 21
    for name, module in modules.items():
        a, b = (side["default"].weight.detach().double() for side in (module.lora_A, module.lora_B))
        singular = torch.linalg.svdvals(12.0 / rank * b @ a)
        norm, effective = found[name.removeprefix("model.").replace(".inner.", ".")]
        assert norm == pytest.approx(float(singular.norm()), rel=1e-9)
        if name.endswith("1.mlp.down_proj"):
            assert (norm, effective) == (0.0, 0.0)
            continue
        share = singular / singular.sum()
        assert effective == pytest.approx(float(torch.special.entr(share).sum().exp()), rel=1e-5)
        assert 1 - 1e-6 <= effective <= rank + 1e-6
        if name.endswith("1.mlp.up_proj"):
            assert effective == pytest.approx(1.0, abs=1e-5)


def test_modules_have_their_familys_names(make_student: Students) -> None:
    stage = FinetuneStage(make_student(window=4, layers=[1]), config(targets=["q_proj", "up_proj"]))
    expected = {"layers.1.self_attn.q_proj", *(f"layers.{n}.mlp.up_proj" for n in range(3))}
    assert set(update_sizes(stage.model)) == expected


# ---- the file


@pytest.mark.slow
def test_a_line_at_the_begin_and_at_each_validation(
    make_student: Students, training_data: TrainingData, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    student = make_student(window=4)
    before = [
        FinetuneStage(make_student(window=4), config()).layer_errors(
            make_batch(training_data.validation, [row], "cpu", False)  # type: ignore[arg-type]
        )
        for row in range(3)
    ]
    finetune(student, training_data, tmp_path, Reporter(tmp_path / "metrics.jsonl"), merge=False)
    lines = lines_of(tmp_path / "lora.jsonl")
    assert [(line["stage"], line["step"]) for line in lines] == [("finetune", step) for step in (0, 4, 8, 9)]
    assert len(training_data.validation) == 3 <= SEQUENCES
    assert lines[0]["errors"] == pytest.approx(torch.stack(before).mean(0).tolist(), rel=1e-5)
    assert all(pair == [0.0, 0.0] for pair in lines[0]["modules"].values())
    assert all(norm > 0 and 1 <= rank <= 2 for norm, rank in lines[-1]["modules"].values())
    metrics = lines_of(tmp_path / "metrics.jsonl")
    losses = {line["step"]: line["validation_loss"] for line in metrics if "validation_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    sizes = next(line["modules"] for line in lines if line["step"] == best)
    assert sizes.keys() == (trained := update_sizes(student)).keys()
    assert all(sizes[name] == pytest.approx(pair, rel=1e-5) for name, pair in trained.items())


@pytest.mark.slow
def test_a_resumed_run_writes_the_file_of_an_undisturbed_one(
    make_student: Students, training_data: TrainingData, tmp_path: Path
) -> None:
    """Killed before its first checkpoint, twice between a validation and the next one, and with half a line left."""
    runs = tmp_path / "run", tmp_path / "other"
    for at in (2, 5, 8):
        torch.manual_seed(0)
        with pytest.raises(Killed):
            finetune(make_student(window=4), training_data, runs[0], Killer(runs[0] / "metrics.jsonl", at))
    with (runs[0] / "lora.jsonl").open("a") as file:
        file.write('{"stage": "finetune", "step": 9, "mod')
    for run in runs:
        torch.manual_seed(0)
        finetune(make_student(window=4), training_data, run, Reporter(run / "metrics.jsonl"))
    assert (runs[0] / "lora.jsonl").read_bytes() == (runs[1] / "lora.jsonl").read_bytes()


@pytest.mark.slow
def test_it_does_not_change_the_training(make_student: Students, training_data: TrainingData, tmp_path: Path) -> None:
    """The random numbers of dropout among what stays."""
    found = []
    for wanted in (True, False):
        torch.manual_seed(0)
        student, folder = make_student(window=4), tmp_path / f"{wanted}"
        finetune(student, training_data, folder, Reporter(folder / "metrics.jsonl"), lora_dynamics=wanted)
        found.append({name: p.detach() for name, p in student.named_parameters()})
        assert (folder / "lora.jsonl").exists() is wanted
    assert all(torch.equal(p, found[1][name]) for name, p in found[0].items())


@pytest.mark.parametrize("kind", ["lora", "full", "control"])
def test_the_student_with_adapters_alone_has_lines(
    make_student: Students, training_data: TrainingData, tmp_path: Path, kind: str
) -> None:
    settings = config(method="full") if kind == "full" else config()
    stage = (WindowStage if kind == "control" else FinetuneStage)(make_student(window=4), settings)
    Dynamics(stage, training_data, Reporter(tmp_path / "metrics.jsonl"), Accelerator(cpu=True), None).begin(0)
    assert (tmp_path / "lora.jsonl").exists() is (kind == "lora")
