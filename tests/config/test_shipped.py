"""The files of configs/: each can be loaded, names no key that does not exist, and is what its comments say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lolcats.config import RunConfig, load_config
from lolcats.config.load import dotted
from lolcats.sweep import load_sweep

CONFIGS = Path(__file__).parents[2] / "configs"
STUDIES = sorted([*(CONFIGS / "studies").glob("*.yaml"), CONFIGS / "studies.yaml"])
RUNS = sorted({*CONFIGS.glob("*.yaml")} - {*STUDIES})


def differences(config: RunConfig, other: RunConfig) -> set[str]:
    """Dotted keys in which two configurations differ."""
    mine, theirs = config.model_dump(), other.model_dump()

    def value(settings: dict[str, Any], key: str) -> Any:
        for part in key.split("."):
            settings = settings[part]
        return settings

    return {
        key for key in dotted(mine) if not isinstance(value(mine, key), dict) and value(mine, key) != value(theirs, key)
    }


def test_all_files_are_looked_at() -> None:
    assert set(RUNS) | set(STUDIES) == set(CONFIGS.rglob("*.yaml"))
    assert {path.stem for path in RUNS} >= {
        "demo",
        "smollm2_135m",
        "llama3_1b",
        "llama3_8b",
        "llama3_70b",
        "llama3_405b",
    }


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_runs_can_be_loaded(path: Path) -> None:
    config = load_config(path)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.name == written["name"] and config.model == written["model"]
    assert set(dotted(written)) <= set(dotted(config.model_dump()))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_studies_can_be_loaded(path: Path) -> None:
    assert load_sweep(path).runs


@pytest.mark.parametrize("name", ["llama3_1b", "llama3_8b"])
def test_llamas_follow_the_recipe(name: str) -> None:
    """What differs from `hybrid` is the model, the text, and how much of it is on the device at once."""
    changed = differences(load_config(CONFIGS / f"{name}.yaml"), load_config("hybrid"))
    assert changed == {
        "model", "name", "data.sources", "transfer.micro_batch_size", "finetune.micro_batch_size",
        "evaluation.batch_size",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "block"), [("llama3_70b", 5), ("llama3_405b", 9)])
def test_the_largest_llamas_follow_the_paper(name: str, block: int) -> None:
    """What differs from `paper` is the model, what is published of it, and where it lies."""
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.transfer.blocks.size == block
    published = {"finetune.rank", "finetune.alpha", "transfer.xent_factor", "transfer.micro_batch_size"}
    changed = differences(config, load_config("paper"))
    assert changed - (published if name == "llama3_405b" else set()) == {
        "model", "name", "linearization.feature_size", "data.template", "transfer.blocks.size",
        "finetune.micro_batch_size", "finetune.sharding.enabled", "evaluation.batch_size", "evaluation.controls",
    } | ({"finetune.gradient_checkpointing"} if name == "llama3_405b" else set())  # fmt: skip


def test_the_complete_file_is_the_recommended_recipe() -> None:
    changed = differences(load_config(CONFIGS / "smollm2_135m.yaml"), load_config("recommended"))
    assert changed == {"model", "name", "transfer.target"}, "full is the same as hybrid"


def test_the_demo_has_the_layer_of_small() -> None:
    demo, small = load_config(CONFIGS / "demo.yaml"), load_config("small")
    assert demo.linearization == small.linearization
