"""Sweep files whose runs take a fraction of a second."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import preloaded
from lolcats import linearize, load_config
from lolcats.config import dump_config
from lolcats.config.strict_yaml import write_yaml
from lolcats.sweep import Sweep, SweepRun, load_sweep


@pytest.fixture(scope="session")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few questions of two tasks of lm-eval, in local files."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["the river", "a mill", "the miller", "his daughter", "a stone", "the green wall", "every star"]
    text = [f"{words[i % 7]} turns above {words[i * 3 % 7]}" for i in range(12)]
    piqa = [{"goal": t, "sol1": words[i % 5], "sol2": words[(i + 3) % 7], "label": i % 2} for i, t in enumerate(text)]
    arc = [
        {"id": str(i), "question": t, "choices": {"text": words[i % 3 : i % 3 + 4], "label": list("ABCD")}}
        | {"answerKey": "ABCD"[i % 4]}
        for i, t in enumerate(text)
    ]
    for name, rows in {"piqa_validation": piqa, "arc_challenge_test": arc}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tiny_settings(model: Path, text: Path, runs: Path) -> dict[str, Any]:
    stage = {"tokens": 288, "batch_size": 4, "warmup_steps": 1, "checkpoint_every": 1}
    return {
        "model": str(model), "device": "cpu", "dtype": "float32", "runs_dir": str(runs),
        "linearization": {"window": 6, "sinks": 1},
        "data": {"sources": [str(text)], "sequence_length": 24, "validation_sequences": 3},
        "transfer": stage, "finetune": stage | {"lr": 1e-2, "kl_factor": 1.0, "rank": 2},
        "evaluation": {"controls": ["window_only", "training_free"]},
    }  # fmt: skip


@pytest.fixture
def settings(model_folder: Path, text_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of three steps a stage."""
    return tiny_settings(model_folder, text_file, tmp_path / "runs")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Path:
    """Folder of a finished run of `settings`. Not to be changed."""
    file = tmp_path_factory.mktemp("trained") / "run.yaml"
    file.write_text(write_yaml(tiny_settings(model_folder, text_file, file.parent)))
    return linearize(load_config(file, ["name=trained"])).path


@pytest.fixture
def finish(trained: Path) -> Callable[..., None]:
    """Have runs of a sweep, by default all, finished without training: copies of one run, each with its settings."""

    def copy(sweep: Sweep, *runs: SweepRun) -> None:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        (sweep.folder / "sweep.yaml").write_text(sweep.text)
        for run in runs or sweep.runs:
            shutil.copytree(trained, run.folder.path, dirs_exist_ok=True)
            run.folder.config_file.write_text(dump_config(run.config))

    return copy


@pytest.fixture
def forked_jobs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs of a sweep are processes that start without importing anything (`preloaded`)."""
    folder = tmp_path_factory.mktemp("jobs")
    server, _ = preloaded.start(folder)
    monkeypatch.setattr(sys, "executable", str(folder / "bin" / "python"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("PYTHONWARNINGS", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # this process has one thread too
    yield
    server.kill()


@pytest.fixture
def sweep_file(settings: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Write study.yaml with `settings`, changed by `changes`, and other parts of a sweep file."""

    def write(changes: dict[str, Any] | None = None, **parts: Any) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(write_yaml({"base": None, "settings": settings | (changes or {}), **parts}))
        return path

    return write


@pytest.fixture
def make_sweep(sweep_file: Callable[..., Path]) -> Callable[..., Sweep]:
    """Load what `sweep_file` writes."""
    return lambda changes=None, **parts: load_sweep(sweep_file(changes, **parts))
