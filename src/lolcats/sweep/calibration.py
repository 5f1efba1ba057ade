"""A short measurement of speed: a few steps of both stages of one run, in a folder that is deleted afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolcats.config import RunConfig, load_config
from lolcats.config.strict_yaml import write_yaml
from lolcats.errors import LolcatsError
from lolcats.files import read_json_lines
from lolcats.models.device import choose_device
from lolcats.runs.recipe import linearize
from lolcats.sweep.plan import STAGES, Speed
from lolcats.sweep.settings import SweepRun
from lolcats.training.graphs import EAGER_STEPS

WARM_UP = EAGER_STEPS + 1
"""Steps that are slower than the others: kernels are compiled and graphs recorded in them."""
MEASURED = 4
"""Steps whose time counts; on a CPU, which has nothing to warm up but its first step, 2."""


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
        speeds = _measure(run.config) | speeds
    names = ", ".join(run.name for run in chosen)
    return Speed(speeds.get("transfer", 1.0), speeds.get("finetune", 1.0), f"measured in a few steps of {names}")


def _measure(config: RunConfig) -> dict[str, float]:
    """Tokens/s of the stages that are on."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(write_yaml(_short(config, folder)))
        metrics = linearize(load_config(file)).metrics_file
        with metrics.open("rb") as raw:
            steps = [line for line, _ in read_json_lines(str(metrics), raw) if "tokens_per_second" in line]
    speeds = {}
    for stage in STAGES:
        # The time since the stage began is tokens / (tokens/s); the difference of two leaves the warm-up out.
        clock = [
            (line["tokens"], line["tokens"] / line["tokens_per_second"]) for line in steps if line["stage"] == stage
        ]
        if len(clock) > 1:
            (tokens, seconds), (first_tokens, first_seconds) = clock[-1], clock[-1 - _measured(config)]
            speeds[stage] = (tokens - first_tokens) / (seconds - first_seconds)
    return speeds


def _measured(config: RunConfig) -> int:
    return MEASURED if _on_gpu(config) else 2


def _on_gpu(config: RunConfig) -> bool:
    return choose_device(config.device).type == "cuda"


def _short(config: RunConfig, folder: str) -> dict[str, Any]:
    """The same run with a few steps, just as much text, and hardly any evaluation."""
    settings = config.model_dump(mode="json")
    steps = (WARM_UP if _on_gpu(config) else 1) + _measured(config)
    length = config.data.sequence_length
    for stage in STAGES:
        settings[stage]["tokens"] = steps * length * settings[stage]["batch_size"]
        settings[stage]["validate_every"] = settings[stage]["checkpoint_every"] = steps
    settings["data"]["validation_sequences"] = 1
    enough = (2 + steps * max(settings[stage]["batch_size"] for stage in STAGES)) * length
    settings["data"]["max_tokens"] = min(enough, config.data.max_tokens or enough)
    settings["evaluation"] = {"max_segments": 1, "controls": [], "segment_length": None}
    settings["runs_dir"], settings["name"] = folder, "calibration"
    return settings
