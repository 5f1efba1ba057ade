"""Stage 1 is done once for all runs whose settings differ only in what comes after it.

A run whose own stage 1 has not begun takes the finished checkpoints of such a run, and goes on from them as it would
from its own. Its results are those that it would have had alone, but for the clock.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.files import atomic_file, write_text
from lolcats.runs.folder import RunFolder
from lolcats.sweep.settings import SweepRun
from lolcats.sweep.state import steps_done

AFTER = {"name", "runs_dir", "finetune", "evaluation"}
"""Settings that stage 1 does not read."""
ORIGIN_FILE = "copied_from.txt"


def stage_one(config: RunConfig) -> str:
    """Text that is equal for runs with the same stage 1; "" for a run without one."""
    if not config.transfer.enabled:
        return ""
    return json.dumps(config.model_dump(mode="json", exclude=AFTER), sort_keys=True)


def groups(runs: Sequence[SweepRun]) -> list[list[SweepRun]]:
    """Runs by stage 1, those that share it together; runs without a stage 1 are alone."""
    found: dict[str, list[SweepRun]] = {}
    for run in runs:
        found.setdefault(stage_one(run.config) or run.name, []).append(run)
    return list(found.values())


def shared_from(config: RunConfig) -> str | None:
    """Name of the run whose stage 1 this run uses, None if it has its own."""
    file = RunFolder.of(config).checkpoints("transfer") / ORIGIN_FILE
    try:
        return file.read_text(encoding="utf-8").strip() if file.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise LolcatsError(f"cannot read {file} ({error}); delete it: it says whose stage 1 this is") from error


def stage_one_is_done(config: RunConfig) -> bool:
    """Whether stage 1 of a run is finished, and its checkpoints are there."""
    folder = RunFolder.of(config).checkpoints("transfer")
    try:
        steps = steps_done(config, "transfer")
    except LolcatsError:  # a broken file is the business of the run that made it
        return False
    last, best = folder / "last.safetensors", folder / "best.safetensors"
    return last.exists() and best.exists() and steps == config.transfer.steps(config.data.sequence_length)


def take_stage_one(run: SweepRun, runs: Sequence[SweepRun]) -> str | None:
    """Copy the finished stage 1 of another of `runs` into a run that has not begun its own.

    Returns:
        The name of the run that the checkpoints are from, None if nothing was copied.
    """
    target = RunFolder.of(run.config)
    key = stage_one(run.config)
    begun = (target.checkpoints("transfer") / "last.safetensors").exists() or target.results().complete
    if not key or begun:
        return None
    for other in runs:
        if other.name != run.name and stage_one(other.config) == key and stage_one_is_done(other.config):
            target.prepare(run.config, resume=True)
            _copy(RunFolder.of(other.config), target, shared_from(other.config) or other.name)
            return other.name
    return None


def _copy(source: RunFolder, target: RunFolder, name: str) -> None:
    lines = source.metrics_file.read_bytes().splitlines() if source.metrics_file.exists() else []
    kept = [line.decode() for line in lines if _is_of_stage_one(line)]
    folder = target.checkpoints("transfer")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / ORIGIN_FILE, name + "\n")
    write_text(target.metrics_file, "".join(line + "\n" for line in kept))
    # `last` comes last: with it the stage counts as begun, and everything else is there by then.
    for file in ("best.safetensors", "last.safetensors"):
        _copy_file(source.checkpoints("transfer") / file, folder / file)


def _is_of_stage_one(line: bytes) -> bool:
    """Whether a line of metrics is whole, and of stage 1; a run that was killed may have left half a line."""
    try:
        return json.loads(line)["stage"] == "transfer"
    except (ValueError, TypeError, LookupError):
        return False


def _copy_file(source: Path, target: Path) -> None:
    with atomic_file(target) as temporary:
        shutil.copyfile(source, temporary)
