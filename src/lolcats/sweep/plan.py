"""What a sweep will cost: runs, steps and tokens of each stage, time, and disk.

No weights are read: bytes on disk come from the shapes of a model alone. Nothing is run but, if it is asked for, a few
steps in a folder that is deleted afterwards (`calibrate`).
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.files import read_json_lines
from lolcats.models.device import choose_device
from lolcats.models.empty import known_model
from lolcats.planning import Machine, choose_machine, disk_bytes, speed_as_set
from lolcats.runs.recipe import linearize
from lolcats.sweep.job import STAGES, TRAINED, Stage, Sweep, SweepRun
from lolcats.training.graphs import EAGER_STEPS
from lolcats.variants import TRAINED_WINDOW

WARM_UP, MEASURED = EAGER_STEPS + 1, 4
"""Steps of a calibration: slow ones, in which kernels are compiled and graphs recorded, and those whose time counts."""
CPU_WARM_UP, CPU_MEASURED = 1, 2


@dataclass(frozen=True)
class Speed:
    """Tokens a second of each stage, and where the numbers are from."""

    transfer: float
    finetune: float
    source: str
    other_seconds: float | None = None
    """A run's seconds beside its stages: loading, measuring, saving; None if unknown."""

    def seconds(self, tokens: dict[Stage, int]) -> float:
        """Time of training on so many tokens, and of what comes beside it."""
        return tokens["transfer"] / self.transfer + tokens["finetune"] / self.finetune + (self.other_seconds or 0.0)


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
    bytes: int | None = None
    problem: str = ""
    """Why the run would fail, as far as the shapes of its model tell."""


@dataclass(frozen=True)
class Plan:
    """The cost of a sweep, run by run."""

    runs: list[PlannedRun]
    speed: Speed | None
    machine: Machine | None = None
    """What the time was computed for, where no speed is known."""

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
    sweep: Sweep,
    runs: Sequence[SweepRun] | None = None,
    speed: Speed | None = None,
    share: bool = True,
    machine: Machine | None = None,
) -> Plan:
    """Count what is left of a sweep.

    Args:
        runs: those that count; None is all of them.
        speed: None takes that of the sweep's finished runs, if there are any.
        share: whether a stage 1 that runs have in common is done once.
        machine: what the time is computed for where no speed is known; None is the GPU that the runs would have here.
    """
    speed = speed or measured_speed(sweep)
    models = functools.cache(known_model)
    runs = sweep.runs if runs is None else runs
    origins = _origins(runs) if share else {}
    machine = None if speed else machine or _machine_here(runs)
    planned = [_planned(run, origins.get(run.name, ""), speed, machine, models) for run in runs]
    return Plan(planned, speed, machine)


def _machine_here(runs: Sequence[SweepRun]) -> Machine | None:
    """The GPU that all runs would have, if it is one whose speed can be computed."""
    try:
        if all(choose_device(run.config.device).type == "cuda" for run in runs):
            return choose_machine(count=1)
    except LolcatsError:  # no such device, or no such GPU in the table: then nothing is known
        pass
    return None


def measured_speed(sweep: Sweep) -> Speed | None:
    """Median tokens/s of the sweep's finished runs, None where a stage was never measured."""
    found: dict[str, list[float]] = {"transfer": [], "finetune": []}
    other = []
    for run in [run for run in sweep.runs if run.status() in TRAINED]:
        results = run.folder.results()
        if not (total := results.seconds.get("total")):
            continue
        for stage in STAGES:
            found[stage] += [speed] if (speed := results.tokens_per_second.get(stage)) else []
        own = [stage for stage in STAGES if not (stage == "transfer" and run.folder.origin("transfer"))]
        other.append(total - sum(results.seconds.get(stage) or 0.0 for stage in (*own, TRAINED_WINDOW)))
    needed = [stage for stage in STAGES if any(getattr(run.config, stage).enabled for run in sweep.runs)]
    if not other or not all(found[stage] for stage in needed):
        return None
    transfer, finetune = (statistics.median(found[stage]) if found[stage] else 1.0 for stage in STAGES)
    source = f"measured in {len(other)} finished {'run' if len(other) == 1 else 'runs'}"
    return Speed(transfer, finetune, source, max(0.0, statistics.median(other)))


def calibrate(runs: Sequence[SweepRun]) -> Speed:
    """Tokens/s of the first of `runs` in which both stages are on (or else of the first with each stage).

    Raises:
        LolcatsError: the run cannot be made, with the reason.
    """
    both = [run for run in runs if run.config.transfer.enabled and run.config.finetune.enabled]
    chosen = both[:1] or [run for stage in STAGES for run in runs if getattr(run.config, stage).enabled][:2]
    if not chosen:
        raise LolcatsError("no run of this sweep trains anything: there is no speed to measure")
    speeds: dict[str, float] = {}
    for run in chosen:
        speeds = _measure_speeds(run.config) | speeds
    names = ", ".join(run.name for run in chosen)
    return Speed(speeds.get("transfer", 1.0), speeds.get("finetune", 1.0), f"measured in a few steps of {names}")


def _measure_speeds(config: RunConfig) -> dict[str, float]:
    """Tokens/s of the stages that are on."""
    on_gpu = choose_device(config.device).type == "cuda"
    warm_up, measured = (WARM_UP, MEASURED) if on_gpu else (CPU_WARM_UP, CPU_MEASURED)
    with tempfile.TemporaryDirectory() as folder:
        metrics = linearize(_short(config, warm_up + measured, folder)).metrics_file
        with metrics.open("rb") as raw:
            steps = [line for line, _ in read_json_lines(str(metrics), raw) if "tokens_per_second" in line]
    speeds = {}
    for stage in STAGES:
        # The time since the stage began is tokens / (tokens/s); the difference of two leaves the warm-up out.
        own = [line for line in steps if line["stage"] == stage]
        clock = [(line["tokens"], line["tokens"] / line["tokens_per_second"]) for line in own]
        if len(clock) > 1:
            (tokens, seconds), (first_tokens, first_seconds) = clock[-1], clock[-1 - measured]
            speeds[stage] = (tokens - first_tokens) / (seconds - first_seconds)
    return speeds


def _short(config: RunConfig, steps: int, folder: str) -> RunConfig:
    """The same run with a few steps, just as much text, and hardly any evaluation."""
    settings: dict[str, Any] = config.model_dump(mode="json")
    length = config.data.sequence_length
    for stage in STAGES:
        settings[stage]["tokens"] = steps * length * settings[stage]["batch_size"]
        settings[stage]["validate_every"] = settings[stage]["checkpoint_every"] = steps
    settings["finetune"]["passing"]["share"] = 0.0  # so little text has no long documents
    enough = (2 + steps * max(settings[stage]["batch_size"] for stage in STAGES)) * length
    settings["data"] |= {"validation_sequences": 1, "max_tokens": min(enough, config.data.max_tokens or enough)}
    settings["evaluation"] = {"max_segments": 1, "controls": [], "segment_length": None}
    return RunConfig.model_validate(settings | {"runs_dir": folder, "name": "calibration"})


def _origins(runs: Sequence[SweepRun]) -> dict[str, str]:
    """Name of a run -> name of the run whose stage 1 it will use: the one of those with the same that is furthest."""
    sharing = [run for run in runs if run.stage_one]
    done = {run.name: run.steps_done("transfer") for run in sharing}
    first: dict[str, str] = {}
    for run in sorted(sharing, key=lambda run: -done[run.name]):  # of equals the first stays first
        first.setdefault(run.stage_one, run.name)
    origins = {run.name: first[run.stage_one] for run in sharing}
    return {name: origin for name, origin in origins.items() if name != origin and not done[name]}


def _window_left(run: SweepRun) -> int:
    """Steps of the trained window that are still to be done."""
    return run.steps("finetune") - run.folder.steps_done(TRAINED_WINDOW) if run.config.trains_window else 0


def _planned(
    run: SweepRun,
    origin: str,
    speed: Speed | None,
    machine: Machine | None,
    models: Callable[[str], PreTrainedModel | None],
) -> PlannedRun:
    config, status = run.config, run.status()
    origin = origin or run.folder.origin("transfer")
    steps: dict[Stage, int] = {s: 0 if origin and s == "transfer" else run.steps(s) for s in STAGES}
    size = {stage: getattr(config, stage).batch_size * config.data.sequence_length for stage in STAGES}
    left: dict[Stage, int] = {s: max(0, steps[s] - run.steps_done(s)) * size[s] for s in STAGES}
    work: dict[Stage, int] = {**left, "finetune": left["finetune"] + _window_left(run) * size["finetune"]}
    seconds = None if speed is None else 0.0 if status in TRAINED else speed.seconds(work)
    planned = PlannedRun(run.name, status, origin, steps, left, seconds)
    try:
        if (teacher := models(config.model)) is None:
            return planned
        if seconds is None and machine is not None:
            each = speed_as_set(teacher, config, machine)
            seconds = 0.0 if status in TRAINED else sum(work[s] / each[s] for s in STAGES if work[s])
        return replace(planned, bytes=disk_bytes(teacher, config).total, seconds=seconds)
    except LolcatsError as error:
        return replace(planned, problem=str(error))
