"""Finished runs of a tiny teacher, of the kinds whose exports differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lolcats import linearize, load_config
from lolcats.runs.folder import RunFolder

Runs = Callable[..., RunFolder]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Runs:
    """Make a run with settings, or give the one that was made with them. Not to be changed."""
    place = tmp_path_factory.mktemp("export")
    made: dict[tuple[str, ...], RunFolder] = {}

    def run(*overrides: str) -> RunFolder:
        if overrides not in made:
            settings = [
                f"model={model_folder}", f"name=run{len(made)}", f"runs_dir={place}", "device=cpu",
                "dtype=float32", "linearization.window=6", "linearization.sinks=2", "linearization.start=matched",
                f"data.sources=[{text_file}]", "data.sequence_length=24", "data.validation_sequences=2",
                "transfer.tokens=192", "transfer.batch_size=4", "finetune.tokens=192", "finetune.batch_size=4",
                "finetune.lr=1e-2", "finetune.warmup_steps=1", "finetune.rank=2", "evaluation.controls=[window_only]",
            ]  # fmt: skip
            with torch.enable_grad():
                made[overrides] = linearize(load_config(None, [*settings, *overrides]))
        return made[overrides]

    return run


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Tokens [2, 20], more than window and sinks."""
    return torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
