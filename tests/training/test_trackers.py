"""Trackers show the numbers of metrics.jsonl, go on where a run goes on, and never end a training."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from killing import Killed, Killer
from lolcats import LolcatsError, linearize
from lolcats.config import RunConfig, TransferConfig
from lolcats.training import Reporter, TrainingData, transfer_attention
from lolcats.training.trackers import Trackers, WandB, check_trackers, trackers_of

Students = Callable[..., Any]
Points = dict[tuple[str, int], float]
"""(STAGE/SCALAR, step) -> value."""


def transfer(student: Any, data: TrainingData, folder: Path, reporter: Reporter) -> None:
    config = TransferConfig(
        tokens=20 * 4 * 8, batch_size=4, validate_every=2, checkpoint_every=3, warmup_steps=2, compile=False
    )
    torch.manual_seed(0)
    transfer_attention(student, data, config, folder=folder / "checkpoints", reporter=reporter)
    reporter.trackers.close(failed=False)


def points_of(metrics: Path) -> Points:
    """All scalars of metrics.jsonl."""
    found: Points = {}
    for line in map(json.loads, metrics.read_text().splitlines()):
        for name, value in line.items():
            if name not in ("stage", "step") and not isinstance(value, list):
                key = f"{line['stage']}/{name}", line["step"]
                assert name == "tokens" or key not in found
                found[key] = value
    return found


def read_tensorboard(folder: Path) -> Points:
    """By TensorBoard's own reader."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found: Points = {}
    for stage in folder.iterdir():
        events = accumulators.EventAccumulator(str(stage), size_guidance={accumulators.SCALARS: 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                assert tag.endswith("/tokens") or (tag, event.step) not in found, f"{tag} has step {event.step} twice"
                found[tag, event.step] = event.value
    return found


def as_float32(points: Points) -> Points:
    return {key: float(np.float32(value)) for key, value in points.items()}


@pytest.mark.slow
def test_tensorboard_shows_what_metrics_hold(
    make_student: Students, training_data: TrainingData, tmp_path: Path
) -> None:
    """Of a run that was killed twice too: what came after its checkpoints is void."""

    def trackers() -> Trackers:
        return trackers_of(["tensorboard"], tmp_path, "try", {})

    for at in (2, 5):
        killed = Killer(tmp_path / "metrics.jsonl", at)
        killed.trackers = trackers()
        with pytest.raises(Killed):
            transfer(make_student(window=4), training_data, tmp_path, killed)
        killed.trackers.close(failed=True)
    reporter = Reporter(tmp_path / "metrics.jsonl", trackers=trackers())
    transfer(make_student(window=4), training_data, tmp_path, reporter)
    points = points_of(tmp_path / "metrics.jsonl")
    assert {step for name, step in points if name == "transfer/loss"} == set(range(1, 9))
    assert {step for name, step in points if name == "transfer/validation_loss"} == {2, 4, 6, 8}
    assert read_tensorboard(tmp_path / "tensorboard") == as_float32(points)


@pytest.mark.slow
def test_a_run_reports_both_stages(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("report_to=tensorboard", "transfer.tokens=192", "finetune.tokens=192")
    folder = linearize(config, until="finetune")
    points = points_of(folder.metrics_file)
    assert {name.split("/")[0] for name, _ in points} == {"transfer", "finetune"}
    assert read_tensorboard(folder.path / "tensorboard") == as_float32(points)
    assert folder.config().report_to == ["tensorboard"]


# ---- Weights & Biases


def read_wandb(folder: Path) -> list[Any]:
    """The records of the offline runs in a folder: a header, and blocks of 32 KB of pieces of records."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        content, place, record = file.read_bytes(), 7, b""
        while place + 7 <= len(content):
            if (left := 32768 - place % 32768) < 7:
                place += left
                continue
            size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
            record += content[place + 7 : place + 7 + size]
            place += 7 + size
            if kind in (1, 4):  # whole, or the last piece
                found.append(messages.Record.FromString(record))
                record = b""
    return found


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module wandb, which sends nothing."""
    wandb = pytest.importorskip("wandb", reason='Weights & Biases is not installed: pip install "lolcats[wandb]"')
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own dependencies
        yield wandb
        wandb.teardown()  # it reads its variables once


@pytest.mark.slow
def test_wandb_shows_what_metrics_hold(
    make_student: Students, training_data: TrainingData, tmp_path: Path, offline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on is the same run there; points of steps that are done again are the points that were there."""
    records = []
    for reporter in (Killer(tmp_path / "metrics.jsonl", 5), Reporter(tmp_path / "metrics.jsonl")):
        place = tmp_path / type(reporter).__name__
        place.mkdir()
        monkeypatch.setenv("WANDB_DIR", str(place))
        reporter.trackers = trackers_of(["wandb"], tmp_path, "try", {"seed": 3})
        try:
            transfer(make_student(window=4), training_data, tmp_path, reporter)
        except Killed:
            reporter.trackers.close(failed=True)
        offline.teardown()  # as a new process begins; what it wrote is there then
        records += read_wandb(place)
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert len({run.run_id for run in runs}) == 1 and {run.project for run in runs} == {"lolcats"}
    assert {run.display_name for run in runs} == {"try"}
    assert any(item.key == "seed" and item.value_json == "3" for item in runs[0].config.update)
    shown: Points = {}
    for record in records:
        items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        step = int(items.pop("transfer/step", 0))
        shown |= {(name, step): value for name, value in items.items() if not name.startswith("_")}
    assert shown == points_of(tmp_path / "metrics.jsonl")


def test_wandbs_own_variables_come_first(tmp_path: Path, offline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROJECT": "mine", "NAME": "other", "RUN_ID": "abc123", "DIR": str(tmp_path / "there")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tmp_path / "there").mkdir()
    tracker = WandB(tmp_path, "try", {})
    tracker.log("transfer", 1, {"loss": 0.5})
    tracker.close(failed=False)
    offline.teardown()
    runs = (record.run for record in read_wandb(tmp_path / "there") if record.WhichOneof("record_type") == "run")
    assert {(run.project, run.display_name, run.run_id) for run in runs} == {("mine", "other", "abc123")}


# ---- what goes wrong


class Broken:
    """Fails after some lines."""

    name = "broken"

    def __init__(self, lines: int) -> None:
        self.left, self.calls = lines, 0

    def resumed(self, stage: str, step: int) -> None:
        self.calls += 1

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self.calls += 1
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("no connection\nto anything")

    def close(self, failed: bool) -> None:
        self.calls += 1


@pytest.mark.slow
def test_a_tracker_that_fails_is_left_out(make_student: Students, training_data: TrainingData, tmp_path: Path) -> None:
    broken, sound = Broken(3), Broken(1000)
    reporter = Reporter(tmp_path / "metrics.jsonl", trackers=Trackers([broken, sound]))
    with pytest.warns(UserWarning, match=r"broken failed .*, the training goes on without it: no connection") as told:
        transfer(make_student(window=4), training_data, tmp_path, reporter)
    assert len(told) == 1 and broken.calls == 1 + 4
    assert sound.calls == 2 + len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2 + 8 + 4


def test_only_the_main_process_reports(tmp_path: Path) -> None:
    broken = Broken(0)
    reporter = Reporter(tmp_path / "metrics.jsonl", enabled=False, trackers=Trackers([broken]))
    reporter.resumed("transfer", 0)
    reporter.validation("transfer", 1, {"loss": 1.0}, 10)
    assert broken.calls == 0


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_before_anything_is_done(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    config = make_config(f"report_to=[{name}]")
    with pytest.raises(LolcatsError, match=rf'report_to {name} needs .* pip install "lolcats\[{name}\]"; or leave'):
        linearize(config)
    assert not Path(config.runs_dir).exists()


def test_a_folder_of_wandbs_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As wandb itself leaves one in the working folder."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(LolcatsError, match="needs the package wandb"):
        check_trackers(["wandb"])


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ("tensorboard", ["tensorboard"]),
        ("none", []),
        ([], []),
        (["wandb", "tensorboard"] * 2, ["wandb", "tensorboard"]),
    ],
)
def test_names_are_given_as_in_transformers(given: Any, held: list[str]) -> None:
    assert RunConfig(report_to=given).report_to == held


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(ValueError, match="'tensorboard' or 'wandb'"):
        RunConfig(report_to=["mlflow"])  # type: ignore[list-item]
