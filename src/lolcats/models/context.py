"""How much text a model was made for, and what happens beyond."""

from __future__ import annotations

from transformers import PreTrainedModel

from lolcats.errors import LolcatsError


def context_limit(model: PreTrainedModel) -> int | None:
    """Tokens of text that the pretrained model was made for; None where its config does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def ends_there(model: PreTrainedModel) -> bool:
    """Whether the model cannot run past `context_limit` at all: its positions are a table, not rotary."""
    text = model.config.get_text_config()
    return context_limit(model) is not None and not getattr(text, "rope_parameters", None)


def check_context(model: PreTrainedModel, tokens: int, what: str, *, beyond: bool = True) -> None:
    """Refuse texts that are too long for a model.

    Args:
        model: the model.
        tokens: of the longest text.
        what: its name in the message.
        beyond: rotary models may read on where they were never trained.

    Raises:
        LolcatsError: the model cannot read so much, or it may not.
    """
    limit = context_limit(model)
    if limit is None or tokens <= limit or (beyond and not ends_there(model)):
        return
    raise LolcatsError(
        f"{what} of {tokens:,} tokens is longer than the model's context of {limit:,} "
        f"(max_position_embeddings); choose at most {limit}"
        + ("" if ends_there(model) else ", or allow what is beyond to see what it does there"),
        hint=None if ends_there(model) else "beyond_context",
    )
