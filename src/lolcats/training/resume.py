"""How far a stage is, and the two files from which it goes on: `last.safetensors` and `best.safetensors`.

`last` is everything that an exact continuation needs; `best` holds the weights of the best validation. Each says what
it belongs to (see `identity`), and neither is taken where it does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lolcats.config.changes import FREE, TUNABLE, Changes, differences, forbidden, tell, with_defaults
from lolcats.errors import LolcatsError
from lolcats.files import remove_leftovers
from lolcats.training.checkpoint import damaged, is_number, read_metadata, save_tensors
from lolcats.training.identity import compare
from lolcats.training.shards import ENDING, find_shards, remove_other_shards


@dataclass
class Progress:
    """Where a stage is."""

    step: int = 0
    seconds: float = 0.0
    best_step: int = -1
    best: dict[str, Any] = field(default_factory=lambda: {"loss": math.inf})
    schedule: dict[str, float] | None = None
    """State of the schedule; None at the start."""
    changes: list[str] = field(default_factory=list)
    """Settings that were changed on the way."""
    gap: int | None = None
    """Most tokens between a fact and its question; None where the stage asks for none."""
    accuracy: float | None = None
    """Share of right answers at the last validation."""


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        folder: where they lie.
        stage: its name.
        steps: how many it has.
        seed: of the order of its data.
        identity: what the stage is, from `identity`.
    """

    def __init__(self, folder: Path, stage: str, steps: int, seed: int, identity: dict[str, Any]) -> None:
        self.last, self.best = folder / "last.safetensors", folder / "best.safetensors"
        self.folder, self.stage, self.steps, self.seed, self.identity = folder, stage, steps, seed, identity

    def find(self) -> Progress:
        """Where the stage is, by its files; they are checked, not loaded.

        Raises:
            LolcatsError: a file is damaged, missing beside the other, or belongs to something else.
        """
        for file in (self.last, self.best):
            remove_leftovers(file)
        if not self.last.exists():
            return Progress()  # the first validation replaces a `best` that is there already
        metadata = read_metadata(self.last)
        progress = self._progress(metadata)
        progress.changes += self._check_identity(self.last, metadata, progress.step)
        self._check_best(progress)
        self._look_at_shards()
        return progress

    def _look_at_shards(self) -> None:
        """See that all shards are there that files name, and delete all others: a kill left them."""
        named = [read_metadata(file) for file in (self.last, self.best) if file.exists()]
        for metadata in named:
            find_shards(self.last, metadata, damaged)
        remove_other_shards(self.folder, named)

    def save_last(
        self,
        tensors: Mapping[str, Tensor],
        progress: Progress,
        schedule: Mapping[str, float],
        shards: Mapping[str, Any] | None = None,
    ) -> None:
        """Write everything that a continuation needs; `shards` is what `write_shards` says of tensors apart."""
        p = progress
        metadata = {"stage": self.stage, "step": p.step, "steps": self.steps, "seconds": p.seconds, "best": p.best}
        metadata |= {"best_step": p.best_step, "schedule": schedule, "seed": self.seed, "changes": p.changes}
        if p.gap is not None:
            metadata |= {"gap": p.gap, "accuracy": p.accuracy}
        self._save(self.last, tensors, {**metadata, **self.identity, **(shards or {})})

    def save_best(
        self, tensors: Mapping[str, Tensor], progress: Progress, shards: Mapping[str, Any] | None = None
    ) -> None:
        """Write the best weights so far; `shards` as for `save_last`."""
        own = {"stage": self.stage, "seed": self.seed, "step": progress.best_step}
        self._save(self.best, tensors, {**progress.best, **own, **self.identity, **(shards or {})})

    def _save(self, file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        save_tensors(file, tensors, metadata)
        if any(self.folder.glob(f"*{ENDING}")):
            remove_other_shards(self.folder, [read_metadata(f) for f in (self.last, self.best) if f.exists()])

    def _progress(self, metadata: Mapping[str, Any]) -> Progress:
        if metadata.get("stage") != self.stage or metadata.get("steps") != self.steps:
            raise LolcatsError(
                f"{self.last} is of stage {metadata.get('stage')!r} with {metadata.get('steps')} steps; this run's is "
                f"{self.stage!r} with {self.steps}. Use the run's own configuration or another name"
            )
        try:
            step, seconds, best_step = (metadata[key] for key in ("step", "seconds", "best_step"))
            best, schedule = dict(metadata["best"]), {k: metadata["schedule"][k] for k in ("factor", "best", "waited")}
            gap, accuracy = metadata.get("gap"), metadata.get("accuracy")
            numbers = [seconds, best["loss"], *schedule.values(), *(n for n in (gap, accuracy) if n is not None)]
            changes = [str(change) for change in metadata.get("changes", [])]
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(self.last, f"its metadata is not complete ({error})") from error
        whole = type(best_step) is int and -1 <= best_step <= self.steps and step <= self.steps
        if not whole or not all(map(is_number, numbers)):
            raise damaged(self.last, "its metadata holds odd numbers")
        return Progress(step, seconds, best_step, best, schedule, changes, gap, accuracy)

    def _check_identity(self, file: Path, metadata: Mapping[str, Any], step: int) -> list[str]:
        """Refuse a file of something else; what was changed and may be, in words."""
        if metadata.get("seed", self.seed) != self.seed:
            raise LolcatsError(f"{file} was made with seed {metadata['seed']}, not {self.seed}: the order of the data "
                               "would change; use the run's own seed or another name")  # fmt: skip
        saved, now = metadata.get("settings"), self.identity["settings"]
        changes = differences(with_defaults(saved), now) if isinstance(saved, dict) else {}
        if bad := forbidden(changes, {self.stage: "finished" if step == self.steps else "begun"}):
            raise LolcatsError(f"{file} was made with other settings, which cannot change any more: {tell(bad)}. "
                               f"Use those, or delete its folder {self.folder} to start this stage anew")  # fmt: skip
        if other := compare(metadata, self.identity):
            raise LolcatsError(
                f"{file} belongs to something else: {'; '.join(other)}. Give back what was there when the stage "
                f"began, or delete its folder {self.folder} to start this stage anew"
            )
        return [f"after step {step}: {tell(changes)}"] if (changes := _tuned(changes)) else []

    def _check_best(self, progress: Progress) -> None:
        """See that the best weights are there."""
        if progress.best_step < 0 or (not self.best.exists() and progress.best_step == progress.step):
            return  # `last` holds them itself
        if not self.best.exists():
            raise LolcatsError(
                f"{self.best} is missing: the best weights of this stage, those of step {progress.best_step}, were in "
                f"it; put it back, or delete its folder {self.folder} to start this stage anew"
            )
        metadata = read_metadata(self.best)
        step = metadata["step"]
        if metadata.get("stage", self.stage) != self.stage or step < progress.best_step or step > self.steps:
            raise damaged(self.best, f"expected the weights of step {progress.best_step} of {self.stage}, got those of "
                                     f"step {step} of {metadata.get('stage', self.stage)}")  # fmt: skip
        self._check_identity(self.best, metadata, min(step, self.steps - 1))
        if step > progress.best_step:
            self._take_later_best(progress, metadata)
        elif metadata.get("loss") != progress.best["loss"]:
            raise damaged(self.best, f"expected the weights whose loss is {progress.best['loss']:.6g}, got those of "
                                     f"{metadata.get('loss')}")  # fmt: skip

    def _take_later_best(self, progress: Progress, metadata: dict[str, Any]) -> None:
        """Of a run that was killed after a validation and before the next `last`: its best weights are those now."""
        if step_of(metadata) <= progress.step or not is_number(metadata.get("loss")):
            raise damaged(self.best, f"expected the weights of step {progress.best_step}, got those of step "
                                     f"{step_of(metadata)}")  # fmt: skip
        other = {"stage", "seed", "step", "tensors", "shards", *self.identity}
        progress.best = {key: value for key, value in metadata.items() if key not in other}
        progress.best_step = step_of(metadata)


def step_of(metadata: Mapping[str, Any]) -> int:
    """The step of a checkpoint."""
    return int(metadata["step"])


def _tuned(changes: Changes) -> Changes:
    """Those of `changes` that change the result."""
    return {name: change for name, change in changes.items() if name not in FREE and name.split(".")[-1] in TUNABLE}
