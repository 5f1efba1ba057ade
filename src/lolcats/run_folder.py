"""The folder of a run: what is in it, and how it is opened without losing anybody's work.

runs/NAME/config.yaml       the settings, complete
          metrics.jsonl     a line a step
          checkpoints/STAGE/{last,best}.safetensors
          results.json      what was measured
          model/            the artefact
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lolcats.config import RunConfig, dump_config, load_config
from lolcats.errors import LolcatsError
from lolcats.files import write_text
from lolcats.model_folder import expand


class RunFolder:
    """A run on disk.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.results_file = path / "results.json"
        self.model = path / "model"
        self.adapter = path / "adapter"

    @classmethod
    def of(cls, config: RunConfig) -> RunFolder:
        """The folder that the settings name."""
        return cls(expand(config.runs_dir) / config.name)

    def prepare(self, config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> None:
        """Make the folder for a new run, or check that this run can go on in it.

        Raises:
            LolcatsError: a run is there and neither `resume` nor `overwrite` was asked for; `resume` with other
                settings; or `overwrite` of a folder that is no run.
        """
        if self.path.exists() and any(self.path.iterdir()) and not self._never_began():
            if not self.config_file.exists():
                raise LolcatsError(f"{self.path} is not empty and is not a run of lolcats; choose another name=...")
            if overwrite:
                shutil.rmtree(self.path)
            elif not resume:
                raise LolcatsError(
                    f"{self.path} already holds a run; give --resume to go on with it, --overwrite to replace it, "
                    "or another name=..."
                )
            elif self.config_file.read_text() != dump_config(config):
                raise LolcatsError(f"{self.config_file} has other settings than this command; resume with its own: "
                                   f"lolcats linearize {self.config_file} --resume")  # fmt: skip
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.config_file, dump_config(config))

    def _never_began(self) -> bool:
        """Whether nothing is here but settings as this class writes them: a run that failed before its first step."""
        if [item.name for item in self.path.iterdir()] != [self.config_file.name]:
            return False
        try:
            return self.config_file.read_text() == dump_config(load_config(self.config_file))
        except LolcatsError:
            return False

    def checkpoints(self, stage: str) -> Path:
        """Folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage

    def results(self) -> dict[str, Any]:
        """What was measured so far."""
        return json.loads(self.results_file.read_text()) if self.results_file.exists() else {}

    def write_results(self, results: dict[str, Any]) -> None:
        """Replace results.json."""
        write_text(self.results_file, json.dumps(results, indent=2) + "\n")
