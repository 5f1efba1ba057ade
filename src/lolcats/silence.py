"""Other libraries' progress bars, hidden."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod


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
