"""`lolcats block`: jobs by their commands, and processes side by side."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import forked
from lolcats.cli.app import main
from lolcats.config import RunConfig, dump_config
from lolcats.runs.blocks import run_blocks
from lolcats.runs.folder import RunFolder
from lolcats.training.checkpoint import load_tensors

Make = Callable[..., RunConfig]


@pytest.fixture
def make(make_config: Make) -> Make:
    return lambda name, *changes: make_config(
        f"name={name}", "transfer.blocks.size=1", "transfer.micro_batch_size=2", "finetune.enabled=false", *changes
    )


def assert_same_stage_1(first: RunFolder, second: RunFolder) -> None:
    found, expected = (
        load_tensors(folder.checkpoints("transfer") / "last.safetensors")[0] for folder in (first, second)
    )
    assert found.keys() == expected.keys() and found
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def write(config: RunConfig, folder: Path) -> str:
    file = folder / f"{config.name}.yaml"
    file.write_text(dump_config(config))
    return str(file)


def test_a_job_for_each_block(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, other = make("jobs"), run_blocks(make("one"))
    file = write(config, tmp_path)
    assert main(["block", file, "--prepare"]) == 0
    assert "2 blocks of 1 layers" in (said := capsys.readouterr().out) and "of disk in" in said
    assert main(["block", file, "1"]) == 1
    assert f"start lolcats block {RunFolder.of(config).config_file} 0" in capsys.readouterr().err
    assert [main(["block", file, *words]) for words in (["0"], ["1"], ["--stitch"], ["0"])] == [0] * 4
    assert "block 0: done already" in capsys.readouterr().out
    assert_same_stage_1(RunFolder.of(config), other)
    assert main(["block", file, "0", "--stitch"]) == 2
    assert main(["block", file, "7"]) == 1
    assert "expected a block from 0 to 1" in capsys.readouterr().err
    assert main(["linearize", file, "--resume", "--until", "transfer"]) == 0
    assert set(RunFolder.of(config).results().seconds) >= {"transfer"}


def start(words: list[str], folder: Path, rank: int, ranks: int) -> forked.ForkServerProcess:
    own = folder / f"{ranks}-{rank}"
    own.mkdir()
    torchrun = {"RANK": f"{rank}", "WORLD_SIZE": f"{ranks}", "LOCAL_RANK": f"{rank}", "CUDA_VISIBLE_DEVICES": "",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # fmt: skip
    return forked.start(["-m", "lolcats.cli", *words], own, os.environ | torchrun)


@pytest.mark.slow
def test_processes_side_by_side_are_a_pipeline(make: Make, tmp_path: Path) -> None:
    config, other = make("pipeline"), run_blocks(make("one"))
    words = ["block", write(config, tmp_path)]
    for ranks, started, code in ((3, 1, 1), (2, 2, 0)):
        running = [start(words, tmp_path, rank, ranks) for rank in range(started)]
        for process in running:
            process.join(200)
        assert [process.exitcode for process in running] == [code] * started
    assert "3 processes train 2 blocks" in (tmp_path / "3-0" / "out").read_text()
    said = (tmp_path / "2-1" / "out").read_text()
    assert "block 1 (layers 1 to 1)" in said and "block 0" not in said
    assert_same_stage_1(RunFolder.of(config), other)
