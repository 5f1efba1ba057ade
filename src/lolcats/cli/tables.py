"""Tables and numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from lolcats.cli.terminal import SafeConsole
from lolcats.variants import label, score_cells

if TYPE_CHECKING:
    from lolcats.config import RunConfig

MIN_WIDTH = 100


def console() -> Console:
    """Standard output; wide enough for our tables where it is a file."""
    out = SafeConsole()
    return out if out.is_terminal else SafeConsole(width=max(out.width, MIN_WIDTH))


def number_table(words: Iterable[str | Column], numbers: Iterable[str]) -> Table:
    """An empty table with columns for words, then columns for numbers, whose headers break between words only."""
    columns = (Column(n, justify="right", min_width=max(map(len, n.split()), default=0)) for n in numbers)
    return Table(*words, *columns, box=None, header_style="bold")


def say(out: Console, *parts: str) -> None:
    """A line that a narrow terminal breaks wherever it ends, so that paths and commands in it can be copied."""
    out.print(*parts, sep="", soft_wrap=True)


def score_table(
    perplexity: Mapping[str, float | None], kl: Mapping[str, float | None], recipe: RunConfig | None = None
) -> Table:
    """Perplexity, its ratio to the teacher's, and the distance from the teacher: a row a variant."""
    table = number_table([""], ["perplexity", "ratio to teacher", "KL to teacher"])
    for name, cells in score_cells(perplexity, kl):
        table.add_row(_label(name, recipe), *cells)
    return table


def _label(name: str, recipe: RunConfig | None) -> str:
    """What a row is called; the student says how it was fine-tuned."""
    if name == "student" and recipe is not None and recipe.finetune.enabled:
        return "after LoRA (student)" if recipe.finetune.method == "lora" else "after fine-tuning (student)"
    return label(name)


def show_layers(indices: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], index]
        else:
            runs.append([index])
    return ", ".join("-".join(map(str, run)) for run in runs) or "none"
