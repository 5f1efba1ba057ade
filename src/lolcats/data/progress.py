"""What is shown while text is tokenised."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from lolcats.data.cache import TokenCache


@contextmanager
def show_reading(name: str, cache: TokenCache, console: Console | None) -> Iterator[Callable[[int, int], None]]:
    """Show records, tokens and tokens/s of one source, and at the end a line that stays.

    Yields:
        A function that takes (records, tokens) so far.
    """
    if console is None:
        yield lambda records, tokens: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn

    started, first, now = time.perf_counter(), -1, (0, 0)
    form = TextColumn("{task.description}", markup=False)
    with Progress(SpinnerColumn(), form, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(f"{name}: reading")

        def tell(records: int, tokens: int) -> None:
            nonlocal first, now
            first = cache.tokens if first < 0 else first
            now = records, tokens
            bars.update(bar, description=f"{name}: {_amount(records, tokens, first, started)}")

        yield tell
    if cache.damaged:
        console.print(f"{name}: the cache was damaged ({cache.damaged}) and made again", markup=False, soft_wrap=True)
    if first >= 0:
        beginning = f" after {first:,} from an earlier run" if first else ""
        text = f"{name}: tokenised {_amount(*now, first, started)}{beginning}"
        console.print(f"{text}; kept in {cache.folder}", markup=False, highlight=False, soft_wrap=True)
    else:
        text = f"{name}: {cache.tokens:,} tokens of {cache.records:,} records from the cache {cache.folder}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _amount(records: int, tokens: int, first: int, started: float) -> str:
    seconds = time.perf_counter() - started
    return f"{records:,} records, {tokens:,} tokens in {seconds:.1f} s ({(tokens - first) / seconds:,.0f} tokens/s)"
