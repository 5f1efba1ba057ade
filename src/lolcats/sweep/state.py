"""What is on disk of a sweep: which runs are finished, which can go on, and which do not fit its file any more."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from lolcats.config import RunConfig, load_config
from lolcats.errors import LolcatsError
from lolcats.files import hold, write_text
from lolcats.runs.folder import RunFolder
from lolcats.sweep.measured import Measured
from lolcats.sweep.settings import Sweep, SweepRun
from lolcats.training.checkpoint import read_metadata

Status = Literal["new", "started", "trained", "finished"]
"""A run that is trained has its model; some of what the section `measure` asks for is missing."""
SWEEP_FILE = "sweep.yaml"
PATIENCE_SECONDS = 60.0
"""How long a call waits for processes of an earlier one."""


def run_status(run: SweepRun) -> Status:
    """How far a run is."""
    folder = RunFolder.of(run.config)
    if not folder.config_file.exists():
        return "new"
    if not folder.results().complete or not folder.has_model():
        return "started"
    return "finished" if Measured.of_run(folder).is_complete(run.measure) else "trained"


def steps_done(config: RunConfig, stage: Literal["transfer", "finetune"]) -> int:
    """Steps of a stage that need not be done again; all of them if the run is finished."""
    folder = RunFolder.of(config)
    if folder.results().complete:
        return getattr(config, stage).steps(config.data.sequence_length)
    file = folder.checkpoints(stage) / "last.safetensors"
    if not file.exists():
        return 0
    step = read_metadata(file).get("step")
    if not isinstance(step, int):
        raise LolcatsError(f"{file} does not say at which step it was written; delete it to start this stage anew")
    return step


def choose_runs(sweep: Sweep, patterns: Sequence[str]) -> list[SweepRun]:
    """The runs whose names match one of the patterns (`*`, `?`, `[...]` as in a shell), in the order of the sweep.

    Raises:
        LolcatsError: a pattern that no name matches; the nearest name is given.
    """
    names = [run.name for run in sweep.runs]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, 1, 0.6)
            more = ", ..." if len(names) > 4 else ""
            hint = f"did you mean {near[0]}?" if near else f"its runs are {', '.join(names[:4])}{more}"
            raise LolcatsError(f"{pattern}: no run of {sweep.name} has this name; {hint}")
    return [run for run in sweep.runs if any(fnmatchcase(run.name, pattern) for pattern in patterns)]


def check_runs(sweep: Sweep, replaced: Sequence[SweepRun] = ()) -> None:
    """Refuse to go on where a run on disk was made with other settings than the sweep gives it now.

    Args:
        replaced: runs that will be deleted, and may differ.

    Raises:
        LolcatsError: which runs differ, in what, and what to do.
    """
    folder = sweep.folder
    if folder.exists() and any(folder.iterdir()) and not (folder / SWEEP_FILE).exists():
        raise LolcatsError(f"{folder} is not empty and is not a sweep of lolcats; choose another name=...")
    problems = []
    for run in sweep.runs:
        run_folder = RunFolder.of(run.config)
        if run.name in [other.name for other in replaced] or not run_folder.config_file.exists():
            continue
        if changes := _changes(run_folder.config_file, run.config):
            problems.append(f"{run.name} ({', '.join(changes)})")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise LolcatsError(
            f"{len(problems)} of the runs in {folder} were made with other settings: {'; '.join(problems[:3])}{more}. "
            "Overwrite them, or choose another name=...",
            hint="overwrite_runs",
        )


def open_folder(sweep: Sweep, source: Path, replaced: Sequence[SweepRun] = ()) -> None:
    """Make the sweep's folder, delete the runs to be replaced, and write down the sweep.

    Args:
        source: the sweep file that was given; it is never written to.
    """
    check_runs(sweep, replaced)
    for run in replaced:
        folder = RunFolder.of(run.config)
        if folder.config_file.exists():
            with folder.held():
                folder.clear()
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LolcatsError(f"cannot make the folder {sweep.folder}: {error.strerror}") from error
    file = sweep.folder / SWEEP_FILE
    if not (file.exists() and source.exists() and file.samefile(source)):
        write_text(file, sweep.text)


@contextmanager
def hold_folder(sweep: Sweep) -> Iterator[None]:
    """Keep other sweeps out of the folder: two of them would do the same runs into the same files.

    Raises:
        LolcatsError: another process holds it, or the place cannot be written.
    """
    busy = f"another `lolcats sweep` works in {sweep.folder}; wait for it, end it, or choose another name=..."
    folder = sweep.folder.resolve()  # one lock, by whatever links it is reached
    with hold(folder.parent / f".{folder.name}.lock", busy):
        yield


@contextmanager
def hold_job(sweep: Sweep, name: str) -> Iterator[None]:
    """Keep other processes from a run or teacher that this one does for a sweep.

    Raises:
        LolcatsError: another process does it, or the place cannot be written.
    """
    with hold(_job_lock(sweep, name), f"another process works on {name} of the sweep in {sweep.folder}"):
        yield


def wait_for_jobs(sweep: Sweep, say: Callable[[str], None], patience: float = PATIENCE_SECONDS) -> None:
    """Wait for the processes of an earlier call, which was killed: they are about to end by themselves.

    Args:
        say: told once that there is something to wait for.
        patience: seconds.

    Raises:
        LolcatsError: one of them has not ended in time.
    """
    deadline = time.monotonic() + patience
    logs = sweep.folder / "logs"
    for lock in sorted(logs.glob(_job_lock(sweep, "*").name)):
        name = lock.name.removeprefix(".").removesuffix(".lock")
        busy = f"a process of an earlier call still works on {name} in {sweep.folder}; wait for it, or end it"
        said = False
        while True:
            try:
                with hold(lock, busy):
                    break
            except LolcatsError:
                if time.monotonic() > deadline:
                    raise
            if not said:
                say(f"waiting for a process of an earlier call, which works on {name}")
                said = True
            time.sleep(0.1)


def _job_lock(sweep: Sweep, name: str) -> Path:
    return sweep.folder / "logs" / f".{name}.lock"


def _changes(file: Path, config: RunConfig) -> list[str]:
    """The first settings in which a file differs from `config`, as "key: in the file -> now"."""
    try:
        before = load_config(file).model_dump(mode="json")
    except LolcatsError as error:
        return [str(error)]
    return _differences(before, config.model_dump(mode="json"))[:3]


def _differences(before: dict[str, object], now: dict[str, object], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in dict.fromkeys([*now, *before]):
        value, old = now.get(key), before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            found += _differences(old, value, f"{prefix}{key}.")
        elif old != value:
            found.append(f"{prefix}{key}: {old} -> {value}")
    return found
