"""The folder of a run: what is in it, and how it is opened without losing anybody's work.

runs/NAME/config.yaml       the settings, complete
          metrics.jsonl     a line a step; lora.jsonl: a line a validation of stage 2
          tensorboard/, wandb/  of trackers, where they were asked for
          checkpoints/STAGE/{last,best}.safetensors; copied_from.txt where they are another run's
          results.json      what was measured; added.safetensors: what stage 1 left of what the linearization added
          model/            the artefact
          .lock             held by the process that works on the run
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from lolcats.config import RunConfig, dump_config, load_config
from lolcats.config.changes import StageState, differences, forbidden, known_settings, tell, with_defaults, with_split
from lolcats.config.strict_yaml import read_yaml, write_yaml
from lolcats.errors import LolcatsError
from lolcats.files import atomic_file, hold, remove_leftovers, remove_leftovers_in, write_text
from lolcats.models.folder import expand
from lolcats.runs.results import Results, read_results
from lolcats.training.checkpoint import read_metadata

STAGES = ("transfer", "finetune")
CHECKPOINTS = ("best.safetensors", "last.safetensors")
"""`last` is copied last: with it a stage counts as begun, and everything else is there by then."""


class RunFolder:
    """A run on disk, in the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.results_file = path / "results.json"
        self.lock_file = path / ".lock"
        self.model = path / "model"
        self.adapter = path / "adapter"

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        """The folder that the settings name."""
        return cls(expand(config.runs_dir) / config.name)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of the run.

        Raises:
            LolcatsError: another one works on it, or the folder is no run and not empty.
        """
        self._refuse_foreign()
        busy = f"another process works on the run {self.path}; wait for it, end it, or choose another name=..."
        with hold(self.lock_file, busy):
            yield

    def prepare(self, config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> None:
        """Make the folder for a new run, or check that this run can go on in it.

        Settings are compared, not the text of config.yaml, which is written only where they have changed.

        Raises:
            LolcatsError: a run is there and neither `resume` nor `overwrite` was asked for; `resume` with settings
                that cannot change any more; or `overwrite` of a folder that is no run.
        """
        self._refuse_foreign()
        if self._is_begun():
            if overwrite:
                self.clear()
            elif not resume:
                raise LolcatsError(
                    f"{self.path} already holds a run; resume it, overwrite it, or choose another name=...",
                    hint="resume_or_overwrite",
                )
            else:
                self._check_changes(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LolcatsError(f"cannot make the folder {self.path}: {error.strerror or error}") from error
        with suppress(OSError):  # what cannot be removed harms nobody
            remove_leftovers_in(self.path)
        if self._saved_config() != config:
            write_text(self.config_file, dump_config(config))

    def clear(self) -> None:
        """Delete what is in the folder, but neither the folder, which may be a link, nor its lock.

        Raises:
            LolcatsError: something cannot be deleted.
        """
        if not self.path.is_dir():
            return
        # Without results it is no finished run, and with its settings it still is a run: so if this is interrupted,
        # nothing is taken for what it is not.
        items = [item for item in self._items() if item not in (self.results_file, self.config_file)]
        for item in [self.results_file, *items, self.config_file]:
            try:
                if item.is_dir() and not item.is_symlink():
                    shutil.rmtree(item)
                else:
                    item.unlink(missing_ok=True)
            except OSError as error:
                raise LolcatsError(f"cannot delete {error.filename or item}: {error.strerror or error}") from error

    def is_finished(self, config: RunConfig) -> bool:
        """Whether nothing is left to do for a run with these settings: all is measured, and its model is there.

        Raises:
            LolcatsError: it is finished with other settings, or its files cannot be read.
        """
        if not self.results().complete or not self.has_model():
            return False
        self._check_changes(config)
        return True

    def config(self) -> RunConfig:
        """The settings in config.yaml, those of a later version left out.

        Raises:
            LolcatsError: it is no configuration.
        """
        return self._read_config()[0]

    def stage_state(self, stage: str) -> StageState:
        """How far a stage is.

        Raises:
            LolcatsError: its checkpoint cannot be read.
        """
        return self._stage(stage)[0]

    def unknown_settings(self) -> list[str]:
        """Settings in config.yaml that this version does not have, because a later one wrote them."""
        return self._read_config()[1] if self.config_file.exists() else []

    def has_model(self) -> bool:
        """Whether the artefact is there and its files can be opened."""
        files = list(self.model.glob("*.safetensors"))
        index = self.model / "model.safetensors.index.json"
        try:
            if index.is_file():
                files = [self.model / name for name in set(json.loads(index.read_text())["weight_map"].values())]
            for file in files:
                with safe_open(file, framework="pt"):
                    pass
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError):
            return False
        return bool(files) and (self.model / "config.json").is_file()

    def checkpoints(self, stage: str) -> Path:
        """Folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage

    def steps_done(self, stage: str) -> int:
        """Steps of a stage that are in its last checkpoint; raises as `stage_state` does."""
        file = self.checkpoints(stage) / "last.safetensors"
        step = read_metadata(file).get("step") if file.exists() else 0
        if not isinstance(step, int):
            raise LolcatsError(f"{file} does not say at which step it was written; delete it to start this stage anew")
        return step

    def origin(self, stage: str) -> str:
        """Name of the run that the checkpoints of a stage were copied from, "" where they are its own."""
        file = self.checkpoints(stage) / "copied_from.txt"
        try:
            return file.read_text(encoding="utf-8").strip() if file.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise LolcatsError(
                f"cannot read {file} ({error}); delete it: it says whose checkpoints these are"
            ) from error

    def copy_stage(self, stage: str, source: RunFolder) -> None:
        """Take the checkpoints and metrics of another run's finished stage, as if it had been done here."""
        folder, before = self.checkpoints(stage), source.checkpoints(stage)
        lines = source.metrics_file.read_bytes().splitlines() if source.metrics_file.exists() else []
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "copied_from.txt", (source.origin(stage) or source.path.name) + "\n")
        write_text(self.metrics_file, "".join(f"{line.decode()}\n" for line in lines if _is_of(line, stage)))
        if (split := source.results().split) is not None:
            self.write_results(self.results().model_copy(update={"split": split}))
        for file in CHECKPOINTS:
            with atomic_file(folder / file) as temporary:
                shutil.copyfile(before / file, temporary)

    def results(self) -> Results:
        """What was measured so far.

        Raises:
            LolcatsError: results.json holds something else.
        """
        return read_results(self.results_file)

    def write_results(self, results: Results) -> None:
        """Replace results.json."""
        write_text(self.results_file, results.text())

    def _items(self) -> list[Path]:
        return [item for item in self.path.iterdir() if item != self.lock_file]

    def _refuse_foreign(self) -> None:
        remove_leftovers(self.config_file)  # of a process that was killed before it had written what makes it a run
        if self.path.is_dir() and self._items() and not self.config_file.exists():
            raise LolcatsError(f"{self.path} is not empty and is not a run of lolcats; choose another name=...")
        if self.path.exists() and not self.path.is_dir():
            raise LolcatsError(f"{self.path} is not a folder; choose another name=...")

    def _is_begun(self) -> bool:
        """Whether more is here than settings as this class writes them: a run that failed before its first step."""
        if not self.path.is_dir() or not self._items():
            return False
        if self._items() != [self.config_file]:
            return True
        try:
            return self.config_file.read_text(encoding="utf-8") != dump_config(load_config(self.config_file))
        except (LolcatsError, OSError, UnicodeDecodeError):
            return True

    def _saved_config(self) -> RunConfig | None:
        """The settings in config.yaml, None where there are none that can be read."""
        try:
            return self._read_config()[0] if self.config_file.exists() else None
        except LolcatsError:
            return None

    def _read_config(self) -> tuple[RunConfig, list[str]]:
        """The settings in config.yaml, and the names of those that this version does not have.

        Raises:
            LolcatsError: it is no configuration.
        """
        try:
            settings = read_yaml(self.config_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
            settings = None
        if isinstance(settings, dict) and (found := known_settings(settings, RunConfig))[1]:
            with tempfile.TemporaryDirectory() as folder:
                known = Path(folder) / self.config_file.name
                known.write_text(write_yaml(found[0]), encoding="utf-8")
                return load_config(known), found[1]
        return load_config(self.config_file), []

    def _check_changes(self, config: RunConfig) -> None:
        """Refuse settings that this run cannot change any more."""
        complete, split = (results := self.results()).complete, results.split
        settings = (settings.model_dump(mode="json") for settings in (config, self._read_config()[0]))
        now, before = (with_split(each, split) for each in settings)
        found = {stage: self._stage(stage) for stage in STAGES}
        states: dict[str, StageState] = {s: "finished" if complete else state for s, (state, _) in found.items()}
        if states["transfer"] == "new" != states["finetune"] and config.transfer.enabled:
            raise LolcatsError(
                f"{self.checkpoints('transfer') / 'last.safetensors'} is missing, though stage 2 has begun; put it "
                f"back, or delete {self.path / 'checkpoints'} to train both stages anew"
            )
        for stage, (_, settings) in found.items():
            # What it was really trained with, whatever config.yaml says by now.
            trained = with_defaults(settings)
            known = {name: now[name] for name in trained if name in now}
            if bad := forbidden(differences(trained, known), states, complete):
                raise LolcatsError(
                    f"{self.checkpoints(stage) / 'last.safetensors'} was made with other settings, which cannot change "
                    f"any more: {tell(bad)}. Use those, delete its folder to start the stage anew, or choose another "
                    "name=..."
                )
            before |= trained
        if bad := forbidden(differences(before, now), states, complete):
            raise LolcatsError(
                f"{self.path} was made with other settings than this command, and they cannot change any more: "
                f"{tell(bad)}. Go on with the run's own, or choose another name=..."
            )

    def _stage(self, stage: str) -> tuple[StageState, dict[str, Any]]:
        """How far a stage is, and the settings that its checkpoint was made with ({}: an older one does not say)."""
        file = self.checkpoints(stage) / "last.safetensors"
        if not file.exists():
            return "new", {}
        metadata = read_metadata(file)
        state = "finished" if metadata["step"] == metadata.get("steps") else "begun"
        return state, metadata.get("settings") or {}


def _is_of(line: bytes, stage: str) -> bool:
    """Whether a line of metrics is whole, and of a stage; a run that was killed may have left half a line."""
    try:
        return json.loads(line)["stage"] == stage
    except (ValueError, TypeError, LookupError):
        return False
