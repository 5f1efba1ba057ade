"""What a run will take: memory, disk, tokens, arithmetic, hours and money, in the cheapest layout that fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from lolcats.config import RunConfig
from lolcats.planning.disk import RunBytes, run_bytes
from lolcats.planning.hardware import Machine
from lolcats.planning.layout import Choice, choose
from lolcats.planning.memory import trained_numbers
from lolcats.planning.shapes import ModelShape, linearized, read_model, shape_of
from lolcats.planning.stages import Layout, StagePlan, finetune_plan, transfer_plan
from lolcats.variants import TRAINED_WINDOW

_PLAIN = "computed, within 15 percent where it was measured (docs/scale.md); loading, text and measuring come on top"
_SLOWER = (
    "computed; weights that are sharded or wait in the host's memory, and layers computed twice, were measured "
    "22 to 27 percent slower in steps of 4,096 tokens a GPU, and sharded ones 9 in steps of 12,288 (docs/scale.md); "
    "loading, text and measuring come on top"
)


def accuracy(layouts: Iterable[Layout]) -> str:
    """How far a plan of these layouts can be trusted, in a line."""
    return _SLOWER if any(x.shard or x.offload or x.checkpointing for x in layouts) else _PLAIN


@dataclass(frozen=True)
class Estimate:
    """A plan of a run."""

    model: ModelShape
    config: RunConfig
    machine: Machine
    chosen: Mapping[str, Choice]
    """Of each stage that is on: transfer, finetune."""
    disk: RunBytes
    """That the run leaves."""

    @property
    def parts(self) -> dict[str, StagePlan]:
        """What is trained: both stages, and the control, which takes what stage 2 takes."""
        parts = {stage: choice.plan for stage, choice in self.chosen.items()}
        return parts | ({TRAINED_WINDOW: parts["finetune"]} if self.config.trains_window else {})

    @property
    def seconds(self) -> float:
        """Of all parts, one after the other."""
        return sum(plan.seconds for plan in self.parts.values())

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs that are busy."""
        return sum(plan.gpu_seconds for plan in self.parts.values()) / 3600

    @property
    def cost(self) -> float | None:
        """What these cost, None without a price."""
        return None if self.machine.price is None else self.machine.price * self.gpu_hours

    @property
    def peak_disk(self) -> int:
        """Bytes: of the run, and of hidden states while there are any."""
        return self.disk.total + max((plan.disk for plan in self.parts.values()), default=0)

    def idle(self) -> list[str]:
        """What could use GPUs that have nothing to do."""
        found = []
        for stage, choice in self.chosen.items():
            batch, ranks = getattr(self.config, stage).batch_size, choice.plan.layout.ranks
            if choice.plan.layout.block is None and ranks < self.machine.count and ranks == batch:
                idle = f"{self.machine.count - ranks} of {self.machine.count} GPUs are idle in {stage}"
                more = f"{stage}.batch_size={self.machine.count} gives each one"
                found.append(f"{idle}: a step has {batch} sequences; {more}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON; bytes, seconds and numbers."""
        return {
            "model": self.config.model,
            "gpu": self.machine.gpu.name,
            "gpus": self.machine.count,
            "parameters": self.model.numbers,
            "added_parameters": self.model.added,
            "trained_in_stage_2": trained_numbers(self.model, self.config) if self.config.finetune.enabled else 0,
            "parts": {name: _part(plan) for name, plan in self.parts.items()},
            "disk_bytes": {"model": self.disk.model, "checkpoints": self.disk.checkpoints,
                           "control": self.disk.control, "peak": self.peak_disk},
            "seconds": self.seconds,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
        }  # fmt: skip


def _part(plan: StagePlan) -> dict[str, Any]:
    memory = plan.memory
    return {
        "layout": vars(plan.layout),
        "memory_bytes": vars(memory),
        "gpu_memory_gib": memory.needed(),
        "tokens": plan.tokens,
        "flops": plan.flops,
        "tokens_per_second": plan.tokens / plan.seconds,
        "seconds": plan.seconds,
        "gpus": plan.gpus,
        "hidden_state_bytes": plan.disk,
    }


def estimate(source: str, config: RunConfig, machine: Machine) -> Estimate:
    """The plan of a run with these settings.

    Args:
        source: see `read_model`.
        config: whose `model` is not looked at.
        machine: to run it on.

    Raises:
        LolcatsError: the model's configuration cannot be read, the settings are not for it, or nothing fits.
    """
    model = linearized(read_model(source), config, in_place=True)
    shape = shape_of(model, config)
    width = 4 if config.dtype == "float32" else 2
    return Estimate(shape, config, machine, choose(shape, config, machine), run_bytes(model, config, width))


def speed_as_set(teacher: PreTrainedModel, config: RunConfig, machine: Machine) -> dict[str, float]:
    """Tokens a second of each stage that is on, on one GPU, in the layout that the settings have: stage -> speed.

    Raises:
        LolcatsError: the settings are not for this model.
    """
    shape = shape_of(linearized(teacher, config), config)
    found = {}
    for stage, plan_of in (("transfer", transfer_plan), ("finetune", finetune_plan)):
        own = getattr(config, stage)
        if own.enabled:
            again = stage == "finetune" and config.finetune.gradient_checkpointing
            rows = own.micro_batch_size or own.batch_size
            layout = Layout(rows=rows, quantization=config.quantization, checkpointing=again)
            plan = plan_of(shape, config, machine, layout)
            found[stage] = plan.tokens / plan.seconds
    return found
