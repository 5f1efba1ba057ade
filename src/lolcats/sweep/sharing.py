"""Stage 1 is done once for all runs whose settings differ only in what comes after it.

A run whose own stage 1 has not begun takes the finished checkpoints of such a run, and goes on from them as it would
from its own. Its results are those that it would have had alone, but for the clock.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.files import atomic_file, write_text
from lolcats.runs.folder import RunFolder
from lolcats.sweep.job import Job, SweepRun

ORIGIN_FILE = "copied_from.txt"
FILES = ("best.safetensors", "last.safetensors")
"""`last` comes last: with it the stage counts as begun, and everything else is there by then."""


def shared_from(config: RunConfig) -> str:
    """Name of the run whose stage 1 this run uses, "" if it has its own."""
    file = RunFolder.of(config).checkpoints("transfer") / ORIGIN_FILE
    try:
        return file.read_text(encoding="utf-8").strip() if file.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise LolcatsError(f"cannot read {file} ({error}); delete it: it says whose stage 1 this is") from error


def stage_one_is_done(run: SweepRun) -> bool:
    """Whether stage 1 of a run is finished, and its checkpoints are there."""
    try:
        done = run.steps_done("transfer")
    except LolcatsError:  # a broken file is the business of the run that made it
        return False
    folder = run.folder.checkpoints("transfer")
    return all((folder / file).exists() for file in FILES) and done == run.steps("transfer")


def take_stage_one(job: Job, runs: Sequence[SweepRun]) -> str:
    """Copy the finished stage 1 of another of `runs` into a run that has not begun its own.

    Returns:
        The name of the run that the checkpoints are from, "" if nothing was copied.
    """
    if not isinstance(job, SweepRun) or not job.stage_one:
        return ""
    if (job.folder.checkpoints("transfer") / FILES[-1]).exists() or job.folder.results().complete:
        return ""
    for other in runs:
        if other.name != job.name and other.stage_one == job.stage_one and stage_one_is_done(other):
            job.folder.prepare(job.config, resume=True)
            _copy(other.folder, job.folder, shared_from(other.config) or other.name)
            return other.name
    return ""


def _copy(source: RunFolder, target: RunFolder, name: str) -> None:
    lines = source.metrics_file.read_bytes().splitlines() if source.metrics_file.exists() else []
    before, folder = source.checkpoints("transfer"), target.checkpoints("transfer")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / ORIGIN_FILE, name + "\n")
    write_text(target.metrics_file, "".join(f"{line.decode()}\n" for line in lines if _is_of_stage_one(line)))
    for file in FILES:
        with atomic_file(folder / file) as temporary:
            shutil.copyfile(before / file, temporary)


def _is_of_stage_one(line: bytes) -> bool:
    """Whether a line of metrics is whole, and of stage 1; a run that was killed may have left half a line."""
    try:
        return json.loads(line)["stage"] == "transfer"
    except (ValueError, TypeError, LookupError):
        return False
