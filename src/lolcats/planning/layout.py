"""Which layouts there are, which of them fit, and which one is cheapest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lolcats.config import OptimConfig, RunConfig
from lolcats.errors import LolcatsError
from lolcats.planning.hardware import Machine
from lolcats.planning.shapes import ModelShape
from lolcats.planning.stages import (
    Layout,
    StagePlan,
    finetune_plan,
    transfer_plan,
)
from lolcats.runs.blocks.plan import block_sizes, cut_layers

SLACK = 1.05
"""A plainer layout is taken where it takes no longer than this times the fastest."""
PACKED_GAIN = 4.0
"""Packed weights are another teacher: they are taken where nothing else fits, or all else takes longer than this."""
HIDDEN = {"": "", "store": "hidden states on disk", "recompute": "hidden states computed anew"}
MOST_ROWS = 64
"""Sequences at once, beyond which nothing is gained."""


@dataclass(frozen=True)
class Choice:
    """The layout of a stage, and why."""

    plan: StagePlan
    why: str


def choose(model: ModelShape, config: RunConfig, machine: Machine) -> dict[str, Choice]:
    """The cheapest layout that fits of each stage that is on: stage -> choice.

    Raises:
        LolcatsError: nothing fits, with what comes nearest; or blocks that do not divide the model.
    """
    block = config.transfer.blocks.size
    if block is not None:
        cut_layers(len(model.layers), block)
    kinds = ["none", "4bit"] if config.quantization == "none" else [config.quantization]
    if config.finetune.enabled and config.finetune.method == "full":
        kinds = ["none"]
    found: dict[str, dict[str, Choice]] = {}
    lacking: list[tuple[float, str]] = []
    for kind in kinds:
        try:
            found[kind] = _of_stages(model, config, machine, block, kind)
        except _NothingFits as error:
            lacking.append(error.args)
    if not found:
        missing, what = min(lacking)
        raise LolcatsError(f"nothing fits into {machine.gpu.memory:.1f} GiB a GPU ({machine.count} x "
                           f"{machine.gpu.name}); nearest is {what}, which lacks {missing:.1f} GiB")  # fmt: skip
    total = {kind: sum(choice.plan.seconds for choice in stages.values()) for kind, stages in found.items()}
    plain = next(iter(found))
    best = min(total, key=lambda kind: total[kind] * (1 if kind == plain else PACKED_GAIN))
    return found[best]


class _NothingFits(Exception):
    """GiB that the nearest layout lacks, and which it is."""


def _of_stages(
    model: ModelShape, config: RunConfig, machine: Machine, block: int | None, kind: str
) -> dict[str, Choice]:
    chosen = {}
    if config.transfer.enabled:
        first = _first_layouts(model, config, machine, block, kind)
        chosen["transfer"] = _cheapest(first, lambda x: transfer_plan(model, config, machine, x), machine, "stage 1")
    if config.finetune.enabled:
        second = _second_layouts(config, machine, kind)
        chosen["finetune"] = _cheapest(second, lambda x: finetune_plan(model, config, machine, x), machine, "stage 2")
    return chosen


def _first_layouts(
    model: ModelShape, config: RunConfig, machine: Machine, block: int | None, kind: str
) -> Iterator[Layout]:
    """Of stage 1, the plainest first."""
    stage = config.transfer
    if block is None:
        for ranks in sorted({1, min(machine.count, stage.batch_size)}):
            yield from (Layout(ranks, rows, kind) for rows in _rows(stage, ranks))
    for size in block_sizes(len(model.layers))[1:] if block is None else [block]:
        count = len(model.layers) // size
        waves = -(-count // machine.count)
        for hidden in ("store", "recompute"):
            if hidden == "store" or machine.count > 1:
                yield from (Layout(-(-count // waves), rows, kind, size, hidden) for rows in _rows(stage, 1))


def _second_layouts(config: RunConfig, machine: Machine, kind: str) -> Iterator[Layout]:
    """Of stage 2, the plainest first."""
    stage = config.finetune
    most = min(machine.count, stage.batch_size)
    counts = sorted({1, most, *(count for count in (8, 16, 32, 64, 128, 256) if count < most)})
    lora = stage.method == "lora"
    for shard, offload in ((False, False), (True, False), (True, True)):
        if (offload and not lora) or (shard and kind == "8bit") or (shard and not lora and stage.follows_teacher):
            continue
        for checkpointing in (False, True):
            for ranks in counts:
                if shard and not offload and ranks == 1:
                    continue
                for rows in _rows(stage, ranks):
                    yield Layout(ranks, rows, kind, shard=shard, offload=offload, checkpointing=checkpointing)


def _rows(stage: OptimConfig, ranks: int) -> list[int]:
    """Sequences at once that divide those of a rank, the most first: fewer take longer, and less memory."""
    own = -(-stage.batch_size // ranks)
    return [rows for rows in range(min(own, MOST_ROWS), 0, -1) if own % rows == 0 and stage.batch_size % rows == 0]


def _cheapest(layouts: Iterator[Layout], plan_of: Callable[[Layout], StagePlan], machine: Machine, name: str) -> Choice:
    plans = [plan_of(layout) for layout in layouts]
    fitting = [plan for plan in plans if plan.lacking(machine) <= 0]
    if not fitting:
        nearest = min(plans, key=lambda plan: plan.lacking(machine))
        raise _NothingFits(nearest.lacking(machine), f"{name} {in_words(nearest.layout)}")
    fastest = min(plan.seconds for plan in fitting)
    chosen = next(plan for plan in fitting if plan.seconds <= SLACK * fastest)
    return Choice(chosen, _reason(chosen, plans, fitting, machine))


def _reason(chosen: StagePlan, plans: list[StagePlan], fitting: list[StagePlan], machine: Machine) -> str:
    """Why this one: what is plainer does not fit, or is slower."""
    before = plans[: plans.index(chosen)]
    plainer = [plan for plan in before if _plan_kind(plan) != _plan_kind(chosen)]
    if not plainer:
        return "the plainest layout fits" + ("" if chosen is plans[0] else ", with fewer sequences at once")
    nearest = min(plainer, key=lambda plan: (plan.lacking(machine) > 0, plan.lacking(machine)))
    if nearest.lacking(machine) > 0:
        return f"{in_words(nearest.layout)} needs {nearest.memory.needed():.1f} GiB of {machine.gpu.memory:.1f}"
    fast = min((plan for plan in plainer if plan in fitting), key=lambda plan: plan.seconds)
    return f"{in_words(fast.layout)} takes {fast.seconds / chosen.seconds:.1f} times as long"


def _plan_kind(plan: StagePlan) -> Layout:
    """The layout but for its sequences at once."""
    return replace(plan.layout, rows=1)


def in_words(layout: Layout) -> str:
    """What a layout is called."""
    parts = ["joint" if layout.block is None else f"in blocks of {layout.block} layers"]
    parts += [HIDDEN[layout.hidden]] * bool(layout.hidden)
    parts += [f"sharded over {layout.ranks} GPUs"] * (layout.shard and layout.ranks > 1)
    parts += ["weights in the host's memory"] * layout.offload
    parts += ["layers computed twice"] * layout.checkpointing
    parts += [f"{layout.quantization} weights"] * (layout.quantization != "none")
    parts += [f"{layout.ranks} GPUs"] * (layout.ranks > 1 and not layout.shard)
    return ", ".join([*parts, f"{layout.rows} {'sequence' if layout.rows == 1 else 'sequences'} at once"])
