"""`lolcats plan`, in this process: nothing is downloaded, and no weights are made."""

import json
from pathlib import Path

import pytest

from .conftest import Run

H100 = ("--gpu", "h100")


@pytest.mark.slow
def test_a_screen_and_its_numbers(cli: Run, place: Path) -> None:
    answer = cli("plan", "llama-3-8b-shape", "--recipe", "paper", *H100, "--price", "2.5", "--json", "plan.json")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert len(lines) < 30
    assert lines[0].startswith("8.03B parameters in 32 layers")
    for stage in ("stage 1", "stage 2", "control: trained window", "all"):
        assert any(line.split("  ")[0].strip() == stage for line in lines), stage
    assert "lolcats linearize paper model=llama-3-8b-shape" in lines
    told = json.loads(Path("plan.json").read_text())
    assert told["parameters"] == 8_030_261_248
    assert told["parts"]["transfer"]["tokens"] == 2442 * 8 * 1024  # 20M in whole steps
    assert told["cost"] == pytest.approx(2.5 * told["gpu_hours"])
    assert told["seconds"] == pytest.approx(sum(part["seconds"] for part in told["parts"].values()))


def test_a_folder_and_its_config_are_the_same_plan(cli: Run, place: Path) -> None:
    """Also where the folder has no weights."""
    folder = place / "bare"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text((place / "teacher" / "config.json").read_text())
    plans = []
    for source in (folder, folder / "config.json"):
        assert cli("plan", source, *H100, "data.sequence_length=32", "--json", "plan.json").code == 0
        plans.append(json.loads(Path("plan.json").read_text()) | {"model": ""})
    assert plans[0] == plans[1]


@pytest.mark.slow
def test_commands_of_a_model_that_does_not_fit(cli: Run, place: Path) -> None:
    answer = cli("plan", "llama-3-70b-shape", "--recipe", "paper", *H100, "--gpus", "8")
    assert answer.code == 0, answer.err
    empty, block, rest = answer.out.splitlines()[-3:]
    assert empty == ""
    assert block.startswith("torchrun --nproc-per-node 8 -m lolcats block paper model=llama-3-70b-shape ")
    assert "transfer.blocks.size=10" in block
    assert rest.startswith("torchrun") and "finetune.sharding.enabled=true" in rest and rest.endswith("--resume")


@pytest.mark.slow
def test_settings_of_a_file(cli: Run, place: Path) -> None:
    Path("mine.yaml").write_text("base: paper\nmodel: llama-3-8b-shape\nfinetune:\n  enabled: false\n")
    alone = cli("plan", "mine.yaml", *H100)
    assert alone.code == 0 and "stage 2" not in alone.out, alone.err
    other = cli("plan", place / "teacher", "mine.yaml", *H100, "data.sequence_length=32")
    assert other.code == 0 and f"lolcats linearize mine.yaml model={place / 'teacher'}" in other.out, other.err


@pytest.mark.slow
def test_what_a_plan_refuses(cli: Run, place: Path) -> None:
    cli("plan", "llama-3-8b-shape", "--gpu", "h101").refused("unknown GPU 'h101'", "h100", "a100-80gb")
    cli("plan", "llama-3-8b-shape").refused("no GPU here", "h100")
    cli("plan", "gone/config.json", *H100).refused("no file gone/config.json")
    (place / "odd").mkdir(exist_ok=True)
    (place / "odd" / "config.json").write_text("{")
    cli("plan", place / "odd", *H100).refused("is not JSON")
    cli("plan", "llama-3-8b-shape", "papers", *H100).refused("papers", "recommended")
    cli("plan", "llama-3-8b-shape", "paper", "--recipe", "hybrid", *H100).refused("paper, hybrid")
    cli("plan", "llama-3-8b-shape", *H100, "--gpus", "0").refused("gpus", "above 0")
    cli("plan", "llama-3-8b-shape", *H100, "transfer.tokns=1").refused("tokns")
    cli("plan", "llama-3-8b-shape", *H100, "transfer.blocks.size=7").refused(
        "does not divide", "expected one of 1, 2, 4, 8, 16, 32"
    )
    cli("plan", "llama-3-8b-shape", *H100, "--memory", "1").refused("nothing fits", "nearest", "lacks")
