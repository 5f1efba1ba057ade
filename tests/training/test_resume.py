"""Coming back after a kill, and the files that it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from killing import Killed, Killer
from lolcats import LolcatsError
from lolcats.config import FinetuneConfig, TransferConfig
from lolcats.training import (
    Reporter,
    TrainingData,
    TrainResult,
    checkpoint,
    finetune_lora,
    transfer_attention,
)

Students = Callable[..., Any]


# ---- kill and resume


def transfer_run(student: PreTrainedModel, data: TrainingData, folder: Path, reporter: Reporter | None) -> TrainResult:
    config = TransferConfig(
        tokens=20 * 4 * 9, batch_size=4, validate_every=2, checkpoint_every=3, warmup_steps=2, compile=False
    )
    return transfer_attention(student, data, config, folder=folder, reporter=reporter)


def finetune_run(student: PreTrainedModel, data: TrainingData, folder: Path, reporter: Reporter | None) -> TrainResult:
    config = FinetuneConfig(
        tokens=20 * 4 * 9, batch_size=4, validate_every=2, checkpoint_every=3, lr=1e-2, rank=2, kl_factor=1.0,
        dropout=0.2, schedule="plateau", plateau_patience=0, warmup_steps=2, train_feature_maps=True,
    )  # fmt: skip
    student.train()
    return finetune_lora(student, data, config, folder=folder, reporter=reporter)[0]


def full_run(student: PreTrainedModel, data: TrainingData, folder: Path, reporter: Reporter | None) -> TrainResult:
    config = FinetuneConfig(
        tokens=20 * 4 * 9, batch_size=4, validate_every=2, checkpoint_every=3, lr=1e-3, method="full", kl_factor=1.0
    )
    return finetune_lora(student, data, config, folder=folder, reporter=reporter)[0]


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Metrics without what depends on the clock."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [[4], [3], [9], [5, 8]], ids=str)
@pytest.mark.parametrize("stage", [transfer_run, finetune_run, full_run])
def test_resumed_is_uninterrupted(
    make_student: Students, training_data: TrainingData, tmp_path: Path, stage: Callable[..., Any], kills: list[int]
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    for at in kills:
        torch.manual_seed(0)
        with pytest.raises(Killed):
            stage(make_student(window=4), training_data, tmp_path / "run", Killer(metrics, at))
    torch.manual_seed(0)
    resumed = make_student(window=4)
    result = stage(resumed, training_data, tmp_path / "run", Reporter(metrics))

    torch.manual_seed(0)
    whole = make_student(window=4)
    expected = stage(whole, training_data, tmp_path / "other", Reporter(tmp_path / "other.jsonl"))
    for (name, p), (other, q) in zip(resumed.named_parameters(), whole.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q), name
    assert (result.steps, result.best_step, result.best_loss) == (9, expected.best_step, expected.best_loss)
    assert result.final == expected.final
    assert lines_of(metrics) == lines_of(tmp_path / "other.jsonl")


@pytest.mark.slow
def test_a_kill_before_the_first_checkpoint_leaves_no_double_lines(
    make_student: Students, training_data: TrainingData, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    with pytest.raises(Killed):
        transfer_run(make_student(window=4), training_data, tmp_path / "run", Killer(metrics, 2))
    transfer_run(make_student(window=4), training_data, tmp_path / "run", Reporter(metrics))
    steps = [line["step"] for line in lines_of(metrics) if "lr" in line]
    assert steps == list(range(1, 10))


@pytest.mark.slow
def test_a_half_written_line_is_dropped(make_student: Students, training_data: TrainingData, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    with pytest.raises(Killed):
        transfer_run(make_student(window=4), training_data, tmp_path / "run", Killer(metrics, 5))
    with metrics.open("a") as file:
        file.write('{"stage": "transfer", "step": 6, "lo')
    transfer_run(make_student(window=4), training_data, tmp_path / "run", Reporter(metrics))
    assert [line["step"] for line in lines_of(metrics) if "lr" in line] == list(range(1, 10))


@pytest.mark.slow
def test_a_finished_stage_is_not_trained_again(
    make_student: Students, training_data: TrainingData, tmp_path: Path
) -> None:
    first, second = make_student(window=4), make_student(window=4)
    expected = transfer_run(first, training_data, tmp_path, None)
    result = transfer_run(second, training_data, tmp_path, Killer(None, 1))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert (result.steps, result.seconds, result.best_loss) == (9, expected.seconds, expected.best_loss)


# ---- files


def killed_at_5(make_student: Students, data: TrainingData, folder: Path) -> Path:
    with pytest.raises(Killed):
        transfer_run(make_student(window=4), data, folder, Killer(None, 5))
    return folder / "last.safetensors"


@pytest.mark.parametrize("size", [0, 7, 200, -5])
def test_a_truncated_checkpoint_is_refused(
    make_student: Students, training_data: TrainingData, tmp_path: Path, size: int
) -> None:
    last = killed_at_5(make_student, training_data, tmp_path)
    last.write_bytes(last.read_bytes()[:size])
    with pytest.raises(LolcatsError, match=r"cannot read the checkpoint .*last.safetensors.*delete it"):
        transfer_run(make_student(window=4), training_data, tmp_path, None)


def test_a_foreign_file_is_refused(make_student: Students, training_data: TrainingData, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "last.safetensors")
    with pytest.raises(LolcatsError, match=r"not a checkpoint of lolcats"):
        transfer_run(make_student(window=4), training_data, tmp_path, None)


@pytest.mark.parametrize("settings", [{"window": 4, "layers": [0]}, {"window": 4, "feature_size": 3}], ids=str)
def test_a_checkpoint_of_another_model_is_refused(
    make_student: Students, training_data: TrainingData, tmp_path: Path, settings: dict[str, Any]
) -> None:
    killed_at_5(make_student, training_data, tmp_path)
    with pytest.raises(LolcatsError, match=r"made with other settings.*linearization\.(layers|feature_size)"):
        transfer_run(make_student(**settings), training_data, tmp_path, None)


def test_a_checkpoint_of_another_length_is_refused(
    make_student: Students, training_data: TrainingData, tmp_path: Path
) -> None:
    killed_at_5(make_student, training_data, tmp_path)
    with pytest.raises(LolcatsError, match=r"with 9 steps; this run's is 'transfer' with 2"):
        transfer_attention(
            make_student(window=4), training_data, TransferConfig(tokens=160, batch_size=4), folder=tmp_path
        )


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint(
    make_student: Students, training_data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = killed_at_5(make_student, training_data, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors: Any, filename: Path, metadata: Any = None) -> None:
        Path(filename).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(LolcatsError, match=r"cannot write .*No space left on device.*untouched"):
        transfer_run(make_student(window=4), training_data, tmp_path, None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert last.name in before


@pytest.mark.slow
def test_checkpoints_are_safetensors(make_student: Students, training_data: TrainingData, tmp_path: Path) -> None:
    transfer_run(make_student(window=4), training_data, tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.safetensors", "last.safetensors"]
    tensors, metadata = checkpoint.load_tensors(tmp_path / "last.safetensors")
    assert metadata["step"] == metadata["steps"] == 9
    assert {name.partition(":")[0] for name in tensors} == {"parameter", "optimizer", "random"}
