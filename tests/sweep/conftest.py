"""Sweep files whose runs take a fraction of a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lolcats.config.strict_yaml import write_yaml
from lolcats.sweep import Sweep, load_sweep


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


@pytest.fixture
def settings(model_folder: Path, text_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of three steps a stage."""
    stage = {"tokens": 288, "batch_size": 4, "warmup_steps": 1, "checkpoint_every": 1}
    return {
        "model": str(model_folder), "device": "cpu", "dtype": "float32", "runs_dir": str(tmp_path / "runs"),
        "linearization": {"window": 6, "sinks": 1},
        "data": {"sources": [str(text_file)], "sequence_length": 24, "validation_sequences": 3},
        "transfer": stage, "finetune": stage | {"lr": 1e-2, "kl_factor": 1.0, "rank": 2},
        "evaluation": {"controls": ["window_only", "training_free"]},
    }  # fmt: skip


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
