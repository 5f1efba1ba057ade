"""A checkpoint goes on only as what it is: its settings, data and weights, and all of its parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from killing import Killed, Killer
from lolcats import LolcatsError
from lolcats.config import FinetuneConfig, TransferConfig
from lolcats.training import Reporter, TrainingData, TrainResult, finetune_lora, transfer_attention
from lolcats.training.checkpoint import load_tensors, read_metadata

Students = Callable[..., Any]
NEW = ("settings", "data", "weights", "changes", "tensors")
"""What checkpoints of early versions do not say."""


def train(
    model: Any, data: TrainingData, folder: Path, reporter: Reporter | None = None, **changes: Any
) -> TrainResult:
    """Six steps with a validation every two and a checkpoint every three."""
    settings: dict[str, Any] = {"tokens": 20 * 4 * 6, "batch_size": 4, "validate_every": 2, "checkpoint_every": 3}
    settings |= {"warmup_steps": 0, "compile": False}
    return transfer_attention(model, data, TransferConfig(**(settings | changes)), folder=folder, reporter=reporter)


@pytest.fixture
def begun(make_student: Students, training_data: TrainingData, tmp_path: Path) -> Path:
    """Folder of a stage that was killed in step 5."""
    with pytest.raises(Killed):
        train(make_student(window=4), training_data, tmp_path / "stage", Killer(None, 5))
    return tmp_path / "stage"


def rewrite(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Change metadata and tensors of a checkpoint."""
    tensors, metadata = load_tensors(file)
    change(metadata, tensors)
    content = {"format": "lolcats-checkpoint-1", "content": json.dumps(metadata)}
    save_file(tensors, file, metadata=content)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"mse_factor": 2.0}, "transfer.mse_factor"), ({"target": "linear"}, "transfer.target"),
     ({"batch_size": 2, "tokens": 240}, "transfer.batch_size")],
    ids=str,
)  # fmt: skip
def test_other_settings_are_refused_by_name(
    make_student: Students, training_data: TrainingData, begun: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(LolcatsError, match=rf"other settings.*{told}"):
        train(make_student(window=4), training_data, begun, **changes)


def test_another_window_is_refused_though_all_shapes_are_equal(
    make_student: Students, training_data: TrainingData, begun: Path
) -> None:
    with pytest.raises(LolcatsError, match=r"linearization\.window 4 -> 6"):
        train(make_student(window=6), training_data, begun)
    train(make_student(window=4, impl="reference"), training_data, begun)  # another speed of the same


@pytest.mark.slow
def test_a_lower_rate_may_go_on_until_the_stage_is_finished(
    make_student: Students, training_data: TrainingData, begun: Path
) -> None:
    result = train(make_student(window=4), training_data, begun, lr=1e-3, checkpoint_every=1)
    assert result.changes == ["after step 3: transfer.lr 0.01 -> 0.001"]
    with pytest.raises(LolcatsError, match=r"transfer\.lr 0\.001 -> 0\.01"):
        train(make_student(window=4), training_data, begun)
    assert train(make_student(window=4), training_data, begun, lr=1e-3).changes == result.changes


def test_other_data_and_weights_are_refused(
    make_student: Students, make_teacher: Callable[..., Any], training_data: TrainingData, begun: Path
) -> None:
    ids = training_data.train.ids.copy()
    ids[7, 3] += 1
    other = TrainingData(type(training_data.train)(ids, training_data.train.loss_mask, training_data.train.document),
                         training_data.validation)  # fmt: skip
    with pytest.raises(LolcatsError, match="the text: its tokens"):
        train(make_student(window=4), other, begun)
    with pytest.raises(LolcatsError, match="the weights that the stage began with"):
        train(make_student(make_teacher(initializer_range=0.2), window=4), training_data, begun)


@pytest.mark.slow
def test_stage_two_goes_on_only_from_its_own_stage_one(
    make_student: Students, training_data: TrainingData, tmp_path: Path
) -> None:
    config = FinetuneConfig(tokens=20 * 4 * 4, batch_size=4, checkpoint_every=1)
    model = make_student(window=4)
    with pytest.raises(Killed):
        finetune_lora(model, training_data, config, folder=tmp_path, reporter=Killer(None, 3))
    other = make_student(window=4)
    with torch.no_grad():
        next(iter(other.parameters())).data[0, 0] += 1
    with pytest.raises(LolcatsError, match="or those that stage 1 left"):
        finetune_lora(other, training_data, config, folder=tmp_path)


@pytest.mark.slow
def test_checkpoints_of_early_versions_go_on(
    make_student: Students, training_data: TrainingData, begun: Path, tmp_path: Path
) -> None:
    for file in begun.iterdir():
        rewrite(file, lambda metadata, tensors: [metadata.pop(key, None) for key in NEW])
    resumed, whole = make_student(window=4), make_student(window=4)
    train(resumed, training_data, begun)
    train(whole, training_data, tmp_path / "whole")
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), whole.parameters(), strict=True))


# ---- the best weights


@pytest.mark.slow
def test_best_weights_that_are_gone_are_not_replaced_by_the_last(
    make_student: Students, training_data: TrainingData, tmp_path: Path
) -> None:
    folder = tmp_path / "stage"
    result = train(make_student(window=4), training_data, folder, lr=100.0, schedule="constant")  # grows worse
    assert result.best_step < result.steps
    kept, before = (folder / "best.safetensors").read_bytes(), load_tensors(folder / "best.safetensors")[0]
    (folder / "best.safetensors").unlink()
    again = {"lr": 100.0, "schedule": "constant"}
    with pytest.raises(LolcatsError, match=rf"is missing.* of step {result.best_step}.*delete its folder"):
        train(make_student(window=4), training_data, folder, **again)
    (folder / "best.safetensors").write_bytes(kept[:-9])
    with pytest.raises(LolcatsError, match=r"cannot read the checkpoint .*best.safetensors"):
        train(make_student(window=4), training_data, folder, **again)
    (folder / "best.safetensors").write_bytes((folder / "last.safetensors").read_bytes())
    with pytest.raises(LolcatsError, match=r"best\.safetensors: expected the weights of step"):
        train(make_student(window=4), training_data, folder, **again)
    shutil.rmtree(folder)  # as it says
    assert train(make_student(window=4), training_data, folder, **again).best_step == result.best_step
    anew = load_tensors(folder / "best.safetensors")[0]
    assert all(torch.equal(anew[name], value) for name, value in before.items())


@pytest.mark.slow
def test_the_last_weights_may_be_the_best(make_student: Students, training_data: TrainingData, tmp_path: Path) -> None:
    first, second = make_student(window=4), make_student(window=4)
    assert train(first, training_data, tmp_path).best_step == 6
    (tmp_path / "best.safetensors").unlink()
    train(second, training_data, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


# ---- what is not finite


def test_weights_that_break_in_the_last_step_are_noticed(
    make_student: Students, training_data: TrainingData, tmp_path: Path
) -> None:
    with pytest.raises(LolcatsError, match=r"at step 1; there is no checkpoint of this stage yet"):
        train(make_student(window=4), training_data, tmp_path, tokens=80, lr=3e37)
    assert not list(tmp_path.iterdir())
    with pytest.raises(LolcatsError, match=r"transfer\.lr is 1e\+38, more than"):
        train(make_student(window=4), training_data, tmp_path, tokens=80, lr=1e38)
    assert train(make_student(window=4), training_data, tmp_path, tokens=80, lr=1e-3).steps == 1


def test_a_broken_step_is_not_kept(make_student: Students, training_data: TrainingData, tmp_path: Path) -> None:
    with pytest.raises(LolcatsError, match=r"at step 1; there is no checkpoint of this stage yet"):
        train(make_student(window=4), training_data, tmp_path, lr=3e37, checkpoint_every=1, validate_every=5)
    assert not list(tmp_path.iterdir())


# ---- damage


def odd(**changes: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda metadata, tensors: metadata.update(changes)


def without(start: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith(start)]:
            del tensors[name]
        metadata.pop("tensors")

    return change


def cast(start: str, dtype: torch.dtype) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        tensors.update({name: t.to(dtype) for name, t in tensors.items() if name.startswith(start)})

    return change


def lose_one(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
    del tensors[next(name for name in tensors if name.startswith("optimizer:exp_avg:"))]


def spoil(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
    next(t for name, t in tensors.items() if name.startswith("parameter:")).view(-1)[0] = float("nan")


@pytest.mark.parametrize(
    "change",
    [
        odd(step="three"), odd(step=-1), odd(step=None), odd(seconds=None), odd(best=3), odd(best={}),
        odd(schedule=None),
        odd(schedule={"factor": "x", "best": 1, "waited": 0}), odd(best_step=99), odd(step=10**9), odd(changes=4),
        lose_one, spoil, without("optimizer:"), without("optimizer:step"), without("random:"),
        cast("optimizer:exp_avg", torch.float16), cast("parameter:", torch.bfloat16), cast("random:", torch.int64),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_names_itself_and_the_way_on(
    make_student: Students, training_data: TrainingData, begun: Path, change: Callable[..., None]
) -> None:
    rewrite(begun / "last.safetensors", change)
    model = make_student(window=4)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(LolcatsError, match=r"cannot read the checkpoint .*last\.safetensors: .*delete its folder"):
        train(model, training_data, begun)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("content", ["", "[1]", "null", "{", "[" * 9000], ids=lambda c: c[:8])
def test_metadata_that_is_something_else(begun: Path, content: str) -> None:
    file = begun / "last.safetensors"
    tensors, _ = load_tensors(file)
    save_file(tensors, file, metadata={"format": "lolcats-checkpoint-1", "content": content})
    with pytest.raises(LolcatsError, match=r"cannot read the checkpoint .*its metadata"):
        read_metadata(file)


def test_metrics_that_cannot_be_read_do_not_stop_a_run(
    make_student: Students, training_data: TrainingData, begun: Path, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.jsonl"
    good = b'{"stage": "transfer", "step": 3, "lr": 0.1}\n'
    odd_lines = b"{}\n"
    metrics.write_bytes(
        odd_lines + good + b'e": 3}\n\xff\xfe\n[1]\n' + b"\0" * 9 + b'\n{"stage": "transfer", "step": 9}\n{"st'
    )
    train(make_student(window=4), training_data, begun, Reporter(metrics))
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert metrics.read_bytes().startswith(good) and [line["step"] for line in lines if "lr" in line] == [3, 4, 5, 6]


def test_the_digest_looks_at_all_tokens_in_memory(training_data: TrainingData) -> None:
    from lolcats.training.identity import data_digest

    first = data_digest(training_data)
    for row in range(len(training_data.train)):
        ids = training_data.train.ids.copy()
        ids[row, 11] += 1
        part = type(training_data.train)(ids, training_data.train.loss_mask, training_data.train.document)
        assert data_digest(TrainingData(part, training_data.validation)) != first
    assert data_digest(training_data) == first != data_digest(TrainingData(training_data.train, training_data.train))


def test_a_checkpoint_says_what_it_is(begun: Path) -> None:
    for file in begun.iterdir():
        with safe_open(file, framework="pt") as opened:
            metadata = json.loads(opened.metadata()["content"])
        assert metadata["settings"]["linearization"]["window"] == 4 and metadata["settings"]["transfer"]["lr"] == 0.01
        assert len(metadata["data"]) == len(metadata["weights"]) == 64
        assert np.isfinite(metadata["step"])
