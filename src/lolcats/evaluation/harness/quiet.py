"""Silence: lm-eval and datasets say much while they work; what matters is said by us."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from lolcats.silence import no_bars

LOGGERS = ("lm_eval", "datasets", "huggingface_hub")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, no messages below critical ones and no progress bars but those that are asked for by name."""
    import datasets
    import lm_eval  # noqa: F401  (sets the level of its own messages when it is imported)

    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    bars = datasets.are_progress_bars_disabled()
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with no_bars():
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
