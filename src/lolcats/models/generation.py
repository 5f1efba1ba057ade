"""Text out of a model: a thin layer over `model.generate`.

What a model's own generation settings ask for (beams, assistants, stop strings, other caches, other results) is for its
users, and much of it cannot be done here. So texts of ours are written by settings of our own; of the model's, only
the tokens that end and fill a text count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lolcats.errors import DataError, LolcatsError
from lolcats.models.context import check_context, context_limit, ends_there
from lolcats.models.vocabulary import check_token_ids, vocabulary_size
from lolcats.placing import main_device

SHOWN = 40
"""Tokens of a text that only shows what a model is like."""
SETTINGS = ("max_new_tokens", "do_sample", "temperature", "top_p")
"""Options that are generation settings; all others go to `generate` as they are."""
PIECE = 2048
"""Longer prompts are read in pieces of so many tokens: what a pass needs beside the cache stays the same."""
NOT_FINITE = (
    "the model's predictions are NaN or infinite, so there is no text: its weights are damaged, or its numbers "
    "overflow (try dtype float32)"
)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int | None = None,
    **options: Any,
) -> str:
    """Continuation of `prompt`, without it; greedy unless `options` say otherwise.

    Args:
        model, tokenizer: what writes.
        prompt: the text to continue.
        max_new_tokens: how much to write at most; None is 40, or what is left of a table of positions.
        options: do_sample, temperature, top_p, streamer, past_key_values.

    Raises:
        LolcatsError: what `write_tokens` raises, or a prompt that is no text.
    """
    ids = encode(tokenizer, prompt)
    if max_new_tokens is None:
        max_new_tokens = with_room(model, ids, SHOWN)
    written = write_tokens(model, tokenizer, ids, max_new_tokens=max_new_tokens, **options)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def with_room(model: PreTrainedModel, ids: Tensor, wanted: int) -> int:
    """How many tokens can be written after ids [1, N]: those wanted, or what is left of a table of positions."""
    room = (context_limit(model) or 0) - ids.shape[1] if ends_there(model) else wanted
    return max(1, min(wanted, room))


def encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> Tensor:
    """The tokens of a text: [1, N].

    Raises:
        LolcatsError: halves of characters in it, or a text without tokens.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError("the text is not UTF-8; convert it first, for instance with iconv -t UTF-8") from error
    ids = list(cast(Any, tokenizer(text, verbose=False, **options)["input_ids"]))
    if not ids:
        raise DataError("the tokenizer makes no token of the text; give a longer one")
    return torch.tensor([ids])


@torch.no_grad()
def write_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, *, max_new_tokens: int, **options: Any
) -> Tensor:
    """The tokens of a text and of its continuation: [1, N + up to max_new_tokens].

    Args:
        model: what writes; its own generation settings are left out but for the tokens that end or fill a text.
        tokenizer: of the model.
        ids: [1, N] tokens to continue.
        max_new_tokens: how much to write at most.
        options: do_sample, temperature, top_p, and arguments of `generate` such as streamer and past_key_values.

    Raises:
        LolcatsError: tokens that the model does not know, more than a table of positions holds, or predictions that
            are not numbers.
    """
    check_token_ids(ids, model, "the prompt")
    check_context(model, ids.shape[1] + max_new_tokens, "prompt and continuation")
    options["max_new_tokens"] = max_new_tokens
    settings = {name: options.pop(name) for name in SETTINGS if name in options}
    if ids.shape[1] > PIECE and hasattr(model.config, "linearization"):  # not every family can read in pieces
        settings["prefill_chunk_size"] = PIECE
    ids = ids.to(main_device(model))
    with own_settings(model, tokenizer, settings) as config:
        return cast(Any, model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Finite()]),
            **options,
        )


class _Finite(LogitsProcessor):
    """Stops where a prediction is not a number: the likeliest of NaNs is a token too, and the text would look empty."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if not scores.amax(-1).isfinite().all():
            raise LolcatsError(NOT_FINITE)
        return scores


@contextmanager
def own_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> Iterator[GenerationConfig]:
    """Inside, the model has settings of ours alone: `generate` fills what a call leaves open from the model's.

    Args:
        model: gets its own settings back at the end; of them, the tokens that end or fill a text are kept.
        tokenizer: of the model.
        settings: what else `GenerationConfig` takes.
    """
    before = model.generation_config
    ends = end_tokens(model)
    fill = [*_tokens(getattr(before, "pad_token_id", None)), *_tokens(tokenizer.pad_token_id), *ends, 0]
    config = GenerationConfig(
        eos_token_id=ends or None, pad_token_id=fill[0], **({"do_sample": False} | settings), use_cache=True
    )
    model.generation_config = config
    try:
        yield config
    finally:
        model.generation_config = before


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens that end a text, of those that the model can make."""
    rows = vocabulary_size(model)
    ends = _tokens(getattr(model.generation_config, "eos_token_id", None))
    return [token for token in ends if rows is None or token < rows]


def _tokens(value: object) -> list[int]:
    """The token ids in a setting that may hold one, several or none."""
    several = value if isinstance(value, list | tuple) else [value]
    return [token for token in several if type(token) is int and token >= 0]
