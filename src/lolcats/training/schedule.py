"""Learning rate schedules."""

from __future__ import annotations

import math

from lolcats.config import OptimConfig


class Schedule:
    """Learning rate at each step; the plateau schedule also listens to validations.

    Args:
        config: the stage's settings.
        steps: number of steps of the stage.
    """

    def __init__(self, config: OptimConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        self.factor = 1.0
        self.best = math.inf
        self.waited = 0

    def lr(self, step: int) -> float:
        """Learning rate of step `step`, from 0."""
        c = self.config
        warm = min(1.0, (step + 1) / c.warmup_steps) if c.warmup_steps else 1.0
        progress = min(1.0, max(0, step - c.warmup_steps) / max(1, self.steps - c.warmup_steps))
        if c.schedule == "cosine":
            shape = c.final_lr + (1 - c.final_lr) * (1 + math.cos(math.pi * progress)) / 2
        elif c.schedule == "linear":
            shape = 1 - (1 - c.final_lr) * progress
        else:
            shape = 1.0
        return c.lr * warm * shape * self.factor

    def observe(self, value: float) -> None:
        """Tell the schedule a validation value (lower is better)."""
        if self.config.schedule != "plateau":
            return
        if value < self.best * (1 - 1e-4):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited > self.config.plateau_patience:
            self.factor *= self.config.plateau_factor
            self.waited = 0

    def state(self) -> dict[str, float]:
        """What a checkpoint must keep."""
        return {"factor": self.factor, "best": self.best, "waited": self.waited}

    def restore(self, state: dict[str, float]) -> None:
        """Inverse of `state`."""
        self.factor, self.best, self.waited = state["factor"], state["best"], int(state["waited"])
