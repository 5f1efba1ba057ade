"""Which layout is taken, and what is said where none fits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from lolcats import load_config
from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.planning import GPUS, Machine, choose_machine, commands
from lolcats.planning.layout import Choice, choose
from lolcats.planning.memory import finetune_memory, transfer_memory
from lolcats.planning.shapes import ModelShape, linearized, read_model, shape_of
from lolcats.planning.stages import Layout, StagePlan, finetune_plan, transfer_plan

LARGE = "llama-3-70b-shape"


def paper(*words: str) -> RunConfig:
    return load_config("paper", list(words))


@cache
def shape(name: str = LARGE) -> ModelShape:
    return shape_of(linearized(read_model(name), paper(), in_place=True), paper())


def chosen(gpus: int, *words: str, name: str = LARGE, memory: float | None = None) -> dict[str, Choice]:
    return choose(shape(name), paper(*words), choose_machine("h100", gpus, memory))


def layouts(found: dict[str, Choice]) -> tuple[Layout, Layout]:
    return found["transfer"].plan.layout, found["finetune"].plan.layout


@pytest.mark.slow
def test_what_fits_is_plain() -> None:
    first, second = layouts(chosen(1, name="llama-3-8b-shape"))
    assert (first, second) == (Layout(rows=8), Layout(rows=8))


@pytest.mark.slow
def test_less_memory_takes_fewer_sequences_then_more_work() -> None:
    rows = [layouts(chosen(1, name="llama-3-8b-shape", memory=gib))[1] for gib in (60.0, 40.0)]
    assert rows[0].rows > rows[1].rows or rows[1].checkpointing
    for gib in (60.0, 40.0, 24.0):
        for choice in chosen(1, name="llama-3-8b-shape", memory=gib).values():
            assert choice.plan.memory.needed() <= gib


@pytest.mark.slow
def test_70b_on_one_gpu_and_on_eight() -> None:
    one, offloaded = layouts(chosen(1))
    assert one.block is not None and one.ranks == 1 and one.hidden == "store"
    assert offloaded.offload and offloaded.ranks == 1
    side_by_side, sharded = layouts(chosen(8))
    assert (side_by_side.block, side_by_side.ranks) == (10, 8)
    assert sharded.shard and not sharded.offload and sharded.ranks == 8


def test_a_block_that_is_given_is_kept() -> None:
    assert chosen(8, "transfer.blocks.size=5")["transfer"].plan.layout.block == 5
    with pytest.raises(
        LolcatsError, match=r"blocks.size 7 does not divide the 80 layers of the model; expected one of 1, 2, 4,"
    ):
        chosen(8, "transfer.blocks.size=7")


def test_nothing_fits() -> None:
    with pytest.raises(LolcatsError, match=r"nothing fits into 3\.0 GiB .* nearest is stage \d .*lacks \d+\.\d GiB"):
        chosen(1, memory=3.0)


@pytest.mark.slow
def test_a_step_in_blocks_does_the_work_of_a_joint_one() -> None:
    machine = Machine(GPUS["h200"])
    joint = transfer_plan(shape(), paper(), machine, Layout(rows=8))
    blocks = transfer_plan(shape(), paper(), machine, Layout(rows=8, block=10, hidden="store"))
    anew = transfer_plan(shape(), paper(), machine, Layout(rows=8, block=10, hidden="recompute"))
    assert blocks.flops == pytest.approx(joint.flops) and blocks.seconds == pytest.approx(joint.seconds, rel=0.01)
    assert anew.flops > 3 * blocks.flops and anew.disk == 0
    assert blocks.memory.weights < joint.memory.weights / 7
    beside = transfer_plan(shape(), paper(), machine, Layout(ranks=8, rows=8, block=10, hidden="store"))
    assert beside.seconds == pytest.approx(blocks.seconds / 8, rel=0.01)


def test_what_sharding_and_checkpointing_save() -> None:
    plain = finetune_memory(shape(), paper(), 1, "none")
    shared = finetune_memory(shape(), paper(), 1, "none", ranks=8, shard=True)
    twice = finetune_memory(shape(), paper(), 1, "none", checkpointing=True)
    away = finetune_memory(shape(), paper(), 1, "none", offload=True)
    assert shared.weights < plain.weights / 5 and shared.trained == plain.trained / 8
    assert twice.activations < plain.activations / 10 and twice.weights == plain.weights
    assert away.host == plain.weights > 20 * away.weights
    assert transfer_memory(shape(), paper(), 1, "4bit").weights < 0.3 * plain.weights


def test_more_work_takes_longer() -> None:
    machine = Machine(GPUS["h100"], 8)

    def seconds(config: RunConfig, **changes: Any) -> float:
        return finetune_plan(shape(), config, machine, replace(Layout(rows=8), **changes)).seconds

    plain = seconds(paper())
    for changes in ({"checkpointing": True}, {"quantization": "4bit"}, {"offload": True}, {"rows": 1}):
        assert seconds(paper(), **changes) > plain, changes
    assert seconds(paper("finetune.kl_factor=1")) > 1.2 * plain
    assert seconds(paper("finetune.error_factor=1")) > 1.2 * plain
    assert seconds(paper("finetune.rank=256")) > plain
    assert seconds(paper(), ranks=8, rows=1) < plain / 4


def test_commands_say_what_differs_from_the_settings() -> None:
    def lines(config: RunConfig, first: Layout, second: Layout) -> list[str]:
        stages = {"transfer": first, "finetune": second}
        plans = {
            name: Choice(StagePlan(x, transfer_memory(shape(), config, 1, "none"), 1, 1.0, 1.0), "")
            for name, x in stages.items()
        }
        return commands(["m"], config, plans)

    assert lines(paper(), Layout(rows=8), Layout(rows=8)) == ["lolcats linearize m"]
    assert lines(paper("finetune.gradient_checkpointing=true"), Layout(rows=8), Layout(rows=4)) == [
        "lolcats linearize m finetune.micro_batch_size=4 finetune.gradient_checkpointing=false"
    ]
    assert lines(paper(), Layout(rows=8), Layout(8, 1, shard=True)) == [
        "lolcats linearize m finetune.micro_batch_size=1 finetune.sharding.enabled=true --until transfer",
        "torchrun --nproc-per-node 8 -m lolcats linearize m finetune.micro_batch_size=1 "
        "finetune.sharding.enabled=true --resume",
    ]
    prepare, one, stitch, rest = lines(paper(), Layout(16, 8, block=5, hidden="store"), Layout(16, 1))
    assert prepare.startswith("lolcats block m transfer.blocks.size=5") and prepare.endswith("--prepare")
    assert one.startswith("lolcats block m N ") and stitch.endswith("--stitch")
    assert rest.startswith("torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8 ")
