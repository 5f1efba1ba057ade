"""Silence: lm-eval and datasets say much while they work; what matters is said by us."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

LOGGERS = ("lm_eval", "datasets", "huggingface_hub")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, no messages below critical ones and no progress bars but those that are asked for by name."""
    import datasets
    import lm_eval  # noqa: F401  (sets the level of its own messages when it is imported)
    from tqdm import tqdm

    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    bars, start = datasets.are_progress_bars_disabled(), tqdm.__init__
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    tqdm.__init__ = partialmethod(start, disable=True)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = start  # type: ignore[method-assign]
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
