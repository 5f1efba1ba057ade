"""What a run should know of its data before it spends hours on them."""

from __future__ import annotations

from collections.abc import Mapping

from lolcats.settings import DataConfig

MANY_TIMES = 4  # reading text so often still helps about as much as new text would; more hardly does


def notes_on_data(config: DataConfig, tokens: int, asked: Mapping[str, int], demo: bool) -> list[str]:
    """Sentences for the person who started the run; none where there is nothing to say.

    Args:
        config: where the data come from.
        tokens: in the training sequences.
        asked: tokens that each stage reads, by its name.
        demo: whether the model is the demo, for which the default data are meant.
    """
    notes = []
    if config.source_names == DataConfig().source_names and not demo:
        notes.append(
            "note: data.sources is python-docs, 0.5 MB of Python's help texts for a first try; name text such as the "
            "model shall read"
        )
    often = {stage: count / tokens for stage, count in asked.items() if count > MANY_TIMES * tokens}
    if often:
        stages = " and ".join(f"{stage} reads them {times:,.0f} times over" for stage, times in often.items())
        keys = " and ".join(f"{stage}.tokens" for stage in often)
        notes.append(f"warning: the data hold {tokens:,} training tokens, {stages}; add text, or lower {keys}")
    return notes
