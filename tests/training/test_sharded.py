"""Stage 2 with sharded weights is stage 2 of one process, from whatever checkpoint it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from forked import run_together
from lolcats import LolcatsError
from lolcats.config import FinetuneConfig, RunConfig
from lolcats.training.checkpoint import damaged
from lolcats.training.parallel import check_batch_size
from lolcats.training.sharding import shards_weights
from lolcats.training.shards import find_shards, read_shards, remove_other_shards, write_shards
from tiny import TEXT, save_teacher, train_tokenizer

SCENES = str(Path(__file__).with_name("sharded_scenes.py"))
WHOLE = ["long-lora", "long-full", "long-lora:a", "long-full:b"]
STARTS = {
    2: ["lora", "blend", "passing", "packed", "errors", "long-lora:a:3", "long-full:b:3"],
    4: ["blend", "long-lora:a:5", "long-full:b:-4"],
    1: ["lora", "blend", "passing", "packed", "errors", *WHOLE, "alone"],
}
"""Number of processes -> what they do, in this order: a and b are killed in two processes, then in four, and end in
one; in one process nothing is sharded."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    save_teacher(folder / "teacher", train_tokenizer([TEXT]))
    for processes, words in STARTS.items():
        for code, output in run_together([SCENES, str(folder), *words], processes, folder):
            assert code == 0, output
    return folder


def losses(file: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, file.read_text().splitlines())
    return [(line["step"], line["loss"] if "loss" in line else line["validation_loss"]) for line in lines]


def assert_same(folder: Path, one: str, other: str, processes: int) -> None:
    expected, got = losses(folder / f"{one}.jsonl"), losses(folder / f"{other}.jsonl")
    assert [step for step, _ in got] == [step for step, _ in expected]
    torch.testing.assert_close([loss for _, loss in got], [loss for _, loss in expected], rtol=1e-5, atol=0)
    weights = load_file(folder / f"{one}.0")
    for process in range(processes):
        for name, value in load_file(folder / f"{other}.{process}").items():
            torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-5, msg=f"{name} of {process}")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "name"), [(n, w) for n in (2, 4) for w in STARTS[n] if ":" not in w])
def test_sharded_weights_train_as_whole_ones(trained: Path, processes: int, name: str) -> None:
    """Both layers; with offloading, gradient checkpointing, state passing, and weights in 4 bits."""
    assert_same(trained, f"{name}-1", f"{name}-{processes}", processes)


@pytest.mark.slow
def test_updates_and_errors_of_layers_are_those_of_whole_weights(trained: Path) -> None:
    """Written by one process: at the begin and after each second step of four."""
    whole, sharded = (
        [json.loads(line) for line in (trained / f"errors-{n}.lora.jsonl").read_text().splitlines()] for n in (1, 2)
    )
    assert [line["step"] for line in whole] == [line["step"] for line in sharded] == [0, 2, 4]
    for one, other in zip(whole, sharded, strict=True):
        assert one["modules"].keys() == other["modules"].keys()
        torch.testing.assert_close(other["errors"], one["errors"], rtol=1e-4, atol=1e-6)
        for name, pair in one["modules"].items():
            torch.testing.assert_close(other["modules"][name], pair, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("whole", "resumed"), [("long-lora-1", "a"), ("long-full-1", "b")])
def test_another_number_of_processes_goes_on(trained: Path, whole: str, resumed: str) -> None:
    """Killed in two processes, then in four (with all weights while they were written), and ended in one."""
    assert_same(trained, whole, resumed, 1)
    assert not list((trained / resumed).glob("*.shards")), "of sharded checkpoints nothing is left"


@pytest.mark.slow
def test_one_process_may_offload_its_weights(trained: Path) -> None:
    assert_same(trained, "blend-1", "alone-1", 1)


@pytest.mark.slow
def test_gradients_that_travel_together_are_those_that_travel_alone(trained: Path) -> None:
    assert (trained / "added-0").exists() and (trained / "added-1").exists()


# ---- files of shards


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_shards_are_read_as_they_were_written(tmp_path: Path, accelerator: Accelerator) -> None:
    file = tmp_path / "last.safetensors"
    tensors = {"parameter:a": torch.arange(12.0).view(4, 3), "optimizer:exp_avg:a": torch.randn(4, 3)}
    metadata = write_shards(file, 7, tensors, accelerator)
    find_shards(file, metadata, damaged)
    read = {name: torch.zeros(4, 3) for name in tensors}
    read_shards(file, metadata["shards"], read, damaged)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    write_shards(file, 7, tensors, accelerator)  # of a run that is killed before its file names it
    remove_other_shards(tmp_path, [metadata])
    assert [item.name for item in tmp_path.iterdir()] == [metadata["shards"]["folder"]]


@pytest.mark.parametrize("damage", ["missing", "short", "gone", "elsewhere"])
def test_damaged_shards_are_told(tmp_path: Path, accelerator: Accelerator, damage: str) -> None:
    file = tmp_path / "last.safetensors"
    metadata = write_shards(file, 7, {"parameter:a": torch.randn(4, 3)}, accelerator)
    (shard,) = (tmp_path / metadata["shards"]["folder"]).iterdir()
    if damage == "missing":
        shard.unlink()
    elif damage == "short":
        shard.write_bytes(shard.read_bytes()[:-4])
    elif damage == "gone":
        remove_other_shards(tmp_path, [])
    else:
        metadata["shards"]["folder"] = "../other"
    with pytest.raises(LolcatsError, match=r"cannot read the checkpoint .*; delete its folder .* to start this stage"):
        find_shards(file, metadata, damaged)


def test_shards_of_other_bytes_are_told(tmp_path: Path, accelerator: Accelerator) -> None:
    file = tmp_path / "last.safetensors"
    metadata = write_shards(file, 7, {"parameter:a": torch.randn(4, 3)}, accelerator)
    (shard,) = (tmp_path / metadata["shards"]["folder"]).iterdir()
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(LolcatsError, match="cannot read the checkpoint"):
        read_shards(file, metadata["shards"], {"parameter:a": torch.zeros(4, 3)}, damaged)


# ---- settings that do not fit


def finetune(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig(sharding={"enabled": True}, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"finetune": {"sharding": {"cpu_offload": True}}}, "set enabled to true"),
        ({"finetune": {"method": "full", "sharding": {"enabled": True, "cpu_offload": True}}}, "method full has none"),
        ({"finetune": {"method": "full", "kl_factor": 1.0, "sharding": {"enabled": True}}}, "set kl_factor to 0"),
        ({"quantization": "8bit", "finetune": {"sharding": {"enabled": True}}}, "use 4bit or none"),
        ({"data": {"sources": ["self"]}, "finetune": {"sharding": {"enabled": True}}}, "name other text"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig(**settings)


def test_a_batch_must_be_shared_evenly() -> None:
    check_batch_size("finetune", finetune(batch_size=6), 4)
    with pytest.raises(LolcatsError, match="set it to a multiple of 4"):
        check_batch_size("finetune", finetune(batch_size=6), 4, sharded=True)
    long = finetune(batch_size=12, passing={"share": 0.5, "chunks": 2})
    with pytest.raises(LolcatsError, match="set it to a multiple of 8"):
        check_batch_size("finetune", long, 4, sharded=True)


def test_one_process_has_nothing_to_share(accelerator: Accelerator) -> None:
    assert not shards_weights(finetune(), accelerator)
    offloaded = FinetuneConfig(sharding={"enabled": True, "cpu_offload": True})  # type: ignore[arg-type]
    with pytest.raises(LolcatsError, match="one process on the CPU; set it to false"):
        shards_weights(offloaded, accelerator)
