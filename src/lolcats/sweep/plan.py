"""What a sweep will cost: runs, steps and tokens of each stage, time, and disk.

Nothing is run for it, and no weights are read: bytes on disk come from the shapes of a model alone.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from transformers import PreTrainedModel

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.modeling.attention import added_parameters
from lolcats.modeling.convert import check_supported
from lolcats.modeling.install import install
from lolcats.models.device import choose_device, choose_dtype
from lolcats.models.empty import known_model
from lolcats.runs.folder import RunFolder
from lolcats.sweep.settings import Sweep, SweepRun
from lolcats.sweep.sharing import groups, shared_from
from lolcats.sweep.state import run_status, steps_done
from lolcats.training.finetune import lora_targets

Stage = Literal["transfer", "finetune"]
STAGES: tuple[Stage, Stage] = ("transfer", "finetune")
DONE = ("trained", "finished")
"""States of a run without a step left."""
ADAMW = 3
"""A checkpoint to go on from holds parameters and two moments; the best one parameters alone. All are float32."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second of each stage, and where the numbers are from."""

    transfer: float
    finetune: float
    source: str
    other_seconds: float | None = None
    """A run's seconds beside its stages: loading, measuring, saving; None if unknown."""

    def seconds(self, tokens: dict[Stage, int]) -> float:
        """Time of training on so many tokens."""
        return tokens["transfer"] / self.transfer + tokens["finetune"] / self.finetune


@dataclass(frozen=True)
class PlannedRun:
    """One line of a plan."""

    name: str
    status: str
    shares: str
    """Run whose stage 1 is used, "" for a stage 1 of its own."""
    steps: dict[Stage, int]
    """Of the whole stage, 0 where it is off or shared."""
    tokens: dict[Stage, int]
    """That are still to be trained on."""
    seconds: float | None
    bytes: int | None
    problem: str = ""
    """Why the run would fail, as far as the shapes of its model tell."""


@dataclass(frozen=True)
class Plan:
    """The cost of a sweep, run by run."""

    runs: list[PlannedRun]
    speed: Speed | None

    def tokens(self, stage: Stage) -> int:
        """All tokens of a stage that are still to be trained on."""
        return sum(run.tokens[stage] for run in self.runs)

    def seconds(self) -> float | None:
        """Time of all that is left, one run after the other; None if no speed is known."""
        known = [run.seconds for run in self.runs if run.seconds is not None]
        return sum(known) if len(known) == len(self.runs) else None

    def bytes(self) -> int | None:
        """Disk that all runs take in the end, those finished too; None if a model cannot be looked at."""
        known = [run.bytes for run in self.runs if run.bytes is not None]
        return sum(known) if len(known) == len(self.runs) else None


def make_plan(
    sweep: Sweep, runs: Sequence[SweepRun] | None = None, speed: Speed | None = None, share: bool = True
) -> Plan:
    """Count what is left of a sweep.

    Args:
        runs: those that count; None is all of them.
        speed: None takes that of the sweep's finished runs, if there are any.
        share: whether a stage 1 that runs have in common is done once.
    """
    speed = speed or measured_speed(sweep)
    disk = DiskEstimate()
    runs = sweep.runs if runs is None else runs
    origins = _origins(runs) if share else {}
    return Plan([_planned(run, origins.get(run.name, ""), speed, disk) for run in runs], speed)


def measured_speed(sweep: Sweep) -> Speed | None:
    """Median tokens/s of the sweep's finished runs, None where a stage was never measured."""
    found: dict[str, list[float]] = {"transfer": [], "finetune": [], "other": []}
    names = []
    for run in [run for run in sweep.runs if run_status(run) in DONE]:
        results = RunFolder.of(run.config).results()
        speeds, seconds = results.tokens_per_second, results.seconds
        if not (total := seconds.get("total")):
            continue
        names.append(run.name)
        for stage in STAGES:
            found[stage] += [speed] if (speed := speeds.get(stage)) else []
        own = [stage for stage in STAGES if not (stage == "transfer" and shared_from(run.config))]
        found["other"].append(total - sum(seconds.get(stage) or 0.0 for stage in own))
    needed = [stage for stage in STAGES if any(getattr(run.config, stage).enabled for run in sweep.runs)]
    if not names or not all(found[stage] for stage in needed):
        return None
    transfer, finetune = (statistics.median(found[stage]) if found[stage] else 1.0 for stage in STAGES)
    source = f"measured in {len(names)} finished {'run' if len(names) == 1 else 'runs'}"
    return Speed(transfer, finetune, source, max(0.0, statistics.median(found["other"])))


def _origins(runs: Sequence[SweepRun]) -> dict[str, str]:
    """Name of a run -> name of the run whose stage 1 it will use: the one of its group that is furthest."""
    origins: dict[str, str] = {}
    for group in groups(runs):
        first = max(group, key=lambda run: steps_done(run.config, "transfer"))  # the first of equals
        for run in group:
            started = steps_done(run.config, "transfer") > 0
            if run is not first and not started:
                origins[run.name] = first.name
    return origins


def _planned(run: SweepRun, origin: str, speed: Speed | None, disk: DiskEstimate) -> PlannedRun:
    config = run.config
    done = run_status(run) in DONE
    origin = origin or shared_from(config) or ""
    steps: dict[Stage, int] = {stage: _steps(config, stage) for stage in STAGES}
    if origin:
        steps["transfer"] = 0
    left: dict[Stage, int] = {s: max(0, steps[s] - steps_done(config, s)) * _tokens_a_step(config, s) for s in STAGES}
    seconds = None if speed is None else 0.0 if done else speed.seconds(left) + (speed.other_seconds or 0.0)
    planned = PlannedRun(run.name, run_status(run), origin, steps, left, seconds, None)
    try:
        return replace(planned, bytes=disk.bytes(config))
    except LolcatsError as error:
        return replace(planned, problem=str(error))


def _steps(config: RunConfig, stage: Stage) -> int:
    settings = getattr(config, stage)
    return settings.steps(config.data.sequence_length) if settings.enabled else 0


def _tokens_a_step(config: RunConfig, stage: Stage) -> int:
    return getattr(config, stage).batch_size * config.data.sequence_length


@dataclass
class DiskEstimate:
    """Sizes of runs; a model's shapes are made once."""

    _models: dict[str, PreTrainedModel | None] = field(default_factory=dict)

    def bytes(self, config: RunConfig) -> int | None:
        """Model and checkpoints of a finished run; None where the model's configuration is not at hand.

        Raises:
            LolcatsError: the model cannot be linearized with these settings.
        """
        if config.model not in self._models:
            self._models[config.model] = known_model(config.model)
        teacher = self._models[config.model]
        return None if teacher is None else _run_bytes(teacher, config)


def _run_bytes(teacher: PreTrainedModel, config: RunConfig) -> int:
    dtype = choose_dtype(config.dtype, choose_device(config.device))
    check_supported(teacher)
    with torch.device("meta"):
        model = copy.deepcopy(teacher)
        install(model, config.linearization)
    added = sum(p.numel() for p in added_parameters(model).values())
    weights = sum(p.numel() for p in model.parameters()) - added
    trained = [added] if config.transfer.enabled else []
    fine = config.finetune
    if fine.enabled and fine.method == "lora":
        trained.append(_lora_parameters(model, config) + (added if fine.train_feature_maps else 0))
    elif fine.enabled:
        trained.append(weights + (added if fine.train_feature_maps else 0))
    width = 4 if fine.enabled and fine.method == "full" else dtype.itemsize  # full fine-tuning leaves float32 weights
    return weights * width + 4 * added + 4 * (ADAMW + 1) * sum(trained)


def _lora_parameters(model: PreTrainedModel, config: RunConfig) -> int:
    shapes = [model.get_submodule(name).weight.shape for name in lora_targets(model, config.finetune.targets)]
    return sum(config.finetune.rank * sum(shape) for shape in shapes)  # type: ignore[arg-type]
