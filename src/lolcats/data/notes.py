"""What a run should know of its data before it spends hours on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lolcats.config import DataConfig, RunConfig

if TYPE_CHECKING:
    from rich.console import Console

MANY_TIMES = 4  # reading text so often still helps about as much as new text would; more hardly does


def notes_on_data(config: RunConfig, tokens: int, console: Console | None = None) -> list[str]:
    """Sentences for the person who started the run; none where there is nothing to say.

    Args:
        config: of the run.
        tokens: in its training sequences.
        console: where they are shown too; None is silent.
    """
    notes = []
    if config.data.source_names == DataConfig().source_names and config.model != "demo":
        notes.append(
            "note: data.sources is python-docs, 0.5 MB of Python's help texts for a first try; name text such as the "
            "model shall read"
        )
    stages = {"transfer": config.transfer, "finetune": config.finetune}
    often = {name: stage.tokens / tokens for name, stage in stages.items() if stage.enabled}
    often = {name: times for name, times in often.items() if times > MANY_TIMES}
    if often:
        read = " and ".join(f"{name} reads them {times:,.0f} times over" for name, times in often.items())
        keys = " and ".join(f"{name}.tokens" for name in often)
        notes.append(f"warning: the data hold {tokens:,} training tokens, {read}; add text, or lower {keys}")
    if console is not None:
        for note in notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
    return notes
