"""Which window the layers have in a step, where a stage varies it: chance, but the same for the same seed and step."""

from __future__ import annotations

import numpy as np

from lolcats.config import OptimConfig

OWN_KEY = 1
"""The window of a step without one: the query's own key."""
STREAM = 0x77
"""Sets these random numbers apart from those of the order of the data."""


def step_window(config: OptimConfig, seed: int, step: int, steps: int) -> int | None:
    """The window of all layers and processes in a step, None for each layer's own.

    Args:
        config: of the stage.
        seed: of the run.
        step: from 0.
        steps: how many the stage has.
    """
    if not config.varies_window:
        return None
    draws = np.random.default_rng([seed, step, STREAM])
    chances = config.window_dropout if isinstance(config.window_dropout, list) else [config.window_dropout]
    if draws.random() < chances[step * len(chances) // steps]:
        return OWN_KEY
    return int(draws.choice(config.windows)) if config.windows else None
