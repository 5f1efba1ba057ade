"""Other libraries say much while they work; what matters is said by us."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

LOGGERS = ("lm_eval", "datasets", "huggingface_hub")


@contextmanager
def no_bars() -> Iterator[None]:
    """Inside, tqdm draws only bars that are asked for by name. It reads TQDM_DISABLE at its import, often too early."""
    from tqdm import tqdm

    start = tqdm.__init__
    tqdm.__init__ = partialmethod(start, disable=True)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = start  # type: ignore[method-assign]


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, lm-eval and datasets say only what is critical, and draw no bars but those that are asked for by name."""
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
