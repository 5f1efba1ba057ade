"""Where a run can be watched beside metrics.jsonl, when asked: TensorBoard, and Weights & Biases.

Each gets the scalars of metrics.jsonl under the name STAGE/SCALAR, at the steps of their stage.
"""

from __future__ import annotations

import importlib
import os
import secrets
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lolcats.errors import LolcatsError, first_line
from lolcats.files import write_text

FLUSH_SECONDS = 10
"""After so long what was logged can be seen."""


class Tracker(Protocol):
    """What shows metrics."""

    name: str

    def resumed(self, stage: str, step: int) -> None:
        """A stage begins, or goes on after `step`."""
        ...

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Show values of a step."""
        ...

    def close(self, failed: bool) -> None:
        """The run ends."""
        ...


class TensorBoard:
    """Event files in `folder`/STAGE, so that a stage that goes on can take its own later points back.

    Args:
        folder: for all stages.
    """

    name = "tensorboard"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[str, Any] = {}
        self._begins: dict[str, int] = {}

    def resumed(self, stage: str, step: int) -> None:
        """Points of the stage after `step` are void: they come once more."""
        self._begins[stage] = step

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Write an event a value."""
        if stage not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            purge = self._begins.get(stage, 0) + 1
            self._writers[stage] = SummaryWriter(
                str(self.folder / stage), purge_step=purge, flush_secs=FLUSH_SECONDS
            )  # fmt: skip
        for name, value in values.items():
            self._writers[stage].add_scalar(f"{stage}/{name}", value, step)

    def close(self, failed: bool) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()


class WandB:
    """One run of Weights & Biases, which goes on where the run of the same folder does.

    Its environment variables hold: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, WANDB_DIR, WANDB_RUN_ID and
    others.

    Args:
        folder: of the run; what wandb keeps lies in `folder`/wandb unless WANDB_DIR is set.
        run_name: unless WANDB_NAME is set.
        settings: shown beside the curves.
    """

    name = "wandb"

    def __init__(self, folder: Path, run_name: str, settings: Mapping[str, Any]) -> None:
        self.folder, self.run_name, self.settings = folder, run_name, settings
        self._run: Any = None
        self._stages: set[str] = set()

    def resumed(self, stage: str, step: int) -> None:
        """Nothing: steps that are done once more give the points that are there."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Log the values; the axis of a stage is its own steps."""
        run = self._open()
        if stage not in self._stages:
            run.define_metric(f"{stage}/step")
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        run.log({f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in values.items()})

    def close(self, failed: bool) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

    def _open(self) -> Any:
        if self._run is None:
            own = {
                "WANDB_PROJECT": ("project", "lolcats"), "WANDB_NAME": ("name", self.run_name),
                "WANDB_DIR": ("dir", str(self.folder)),
            }  # fmt: skip
            options = dict(pair for variable, pair in own.items() if not os.environ.get(variable))
            if not os.environ.get("WANDB_RUN_ID"):
                options["id"] = self._identity()
            self._run = _wandb().init(config=dict(self.settings), resume="allow", **options)
        return self._run

    def _identity(self) -> str:
        """The name by which wandb knows the run again."""
        file = self.folder / "wandb" / "id.txt"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, secrets.token_hex(4) + "\n")
        return file.read_text(encoding="utf-8").strip()


class Trackers:
    """Several trackers. One that fails is left out from then on: the training is worth more than its picture."""

    def __init__(self, trackers: Iterable[Tracker] = ()) -> None:
        self._trackers = list(trackers)

    def resumed(self, stage: str, step: int) -> None:
        """See `Tracker`."""
        self._tell("resumed", stage, step)

    def log(self, line: Mapping[str, Any]) -> None:
        """Show the numbers of a line of metrics, lists (a value a layer) left out."""
        if self._trackers:
            values = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
            self._tell("log", line["stage"], line["step"], values)

    def close(self, failed: bool) -> None:
        """The run ends; `failed`: by an exception."""
        self._tell("close", failed)
        self._trackers = []

    def _tell(self, what: str, *arguments: Any) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, what)(*arguments)
            except Exception as error:
                self._trackers.remove(tracker)
                warnings.warn(
                    f"{tracker.name} failed and is told no more, the training goes on without it: {first_line(error)}",
                    stacklevel=3,
                )


def _wandb() -> Any:
    module = importlib.import_module("wandb")
    if not hasattr(module, "init"):
        raise ImportError("wandb is a folder here and no package")
    return module


def check_trackers(names: Iterable[str]) -> None:
    """See that the packages of trackers are there.

    Raises:
        LolcatsError: one is missing.
    """
    for name in names:
        try:
            _wandb() if name == "wandb" else importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise LolcatsError(
                f'report_to {name} needs the package {name}: pip install "lolcats[{name}]"; or leave it out'
            ) from error


def trackers_of(names: Iterable[str], folder: Path, run_name: str, settings: Mapping[str, Any]) -> Trackers:
    """The trackers of a run; nothing is opened before there is something to show.

    Args:
        names: of `report_to`.
        folder: of the run.
        run_name: how it is called.
        settings: all of its settings, as JSON.
    """
    make = {
        "tensorboard": lambda: TensorBoard(folder / "tensorboard"),
        "wandb": lambda: WandB(folder, run_name, settings),
    }
    return Trackers(make[name]() for name in names)
