"""What is asked of a batch: the rows of its file, read and checked before the first token is made.

A row that cannot be done carries its error; the others do not suffer from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.data.turns import read_turns
from lolcats.errors import DataError, LolcatsError, did_you_mean
from lolcats.identity import key_of
from lolcats.models.context import check_context
from lolcats.models.conversation import render
from lolcats.models.generation import encode
from lolcats.models.vocabulary import check_token_ids

Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A text to continue, the messages of a conversation, or a row as files have it."""
SYNONYMS = {"custom_id": "id", "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
"""Names in the batch files of OpenAI and vLLM."""
ENVELOPE = ("method", "url", "body")
"""Of a request in these files; what is asked lies in "body"."""
NEUTRAL = {
    "n": 1, "best_of": 1, "stream": False, "logprobs": False, "top_logprobs": 0, "echo": False, "ignore_eos": False,
    "top_k": -1, "min_p": 0, "min_tokens": 0, "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1,
}  # fmt: skip
"""What such files may also say, with the one value that can be done here."""
NAMES = ("prompt", "messages", "id", "metadata", "max_new_tokens", "temperature", "top_p", "seed", "stop")
EVERY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings whose angles all change with the longest text of a batch."""


@dataclass(frozen=True)
class Defaults:
    """What holds for rows that do not say it."""

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    """Of the run: the draws of a row also depend on its index."""


@dataclass(frozen=True)
class Request:
    """A row."""

    index: int
    id: Any = None
    metadata: Any = None
    ids: Tensor | None = None
    """[1, N] tokens of the prompt; None where they cannot be made."""
    max_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | str = 0
    stop: tuple[str, ...] = ()
    error: str | None = None
    """Why the row cannot be done."""

    @property
    def prompt_tokens(self) -> int:
        """N."""
        return 0 if self.ids is None else self.ids.shape[1]

    @property
    def key(self) -> str:
        """A name for all that its text depends on beside the model."""
        assert self.ids is not None
        draws = (self.temperature, self.top_p, self.seed) if self.temperature else ()
        return key_of(self.ids.tolist(), self.max_new_tokens, self.stop, draws)


def read_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    defaults: Defaults,
    batch_size: int,
) -> list[Request]:
    """The rows in their order, those that cannot be done with their error."""
    return [_read(model, tokenizer, prompt, index, defaults, batch_size) for index, prompt in enumerate(prompts)]


def _read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    index: int,
    defaults: Defaults,
    batch_size: int,
) -> Request:
    own: dict[str, Any] = {}
    try:
        row = _named(prompt)
        own = {name: row.pop(name) for name in ("id", "metadata") if name in row}
        settings = _settings(row, index, defaults)
        ids = _tokens(row, tokenizer)
        request = Request(index, **own, ids=ids, **settings)
        check_token_ids(ids, model, "the prompt")
        _check_length(model, request, batch_size)
    except LolcatsError as error:
        return Request(index, **own, error=str(error))
    return request


def _named(prompt: Prompt) -> dict[str, Any]:
    """A row by our names; a value of null is as good as none."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if not isinstance(prompt, Mapping):
        return {"messages": prompt}
    row = dict(prompt)
    if isinstance(row.get("body"), Mapping):
        body = {name: value for name, value in row["body"].items() if name != "model"}
        row = {name: value for name, value in row.items() if name not in ENVELOPE} | body
    named: dict[str, Any] = {}
    for name, value in row.items():
        known = SYNONYMS.get(name, name)
        if known in NEUTRAL:
            if value is not None and value != NEUTRAL[known]:
                raise DataError(f'"{name}" cannot be {value!r:.60} here, only {NEUTRAL[known]}; leave it out')
            continue
        if known not in NAMES:
            advice = did_you_mean(name, (*NAMES, *SYNONYMS), f"expected {', '.join(NAMES)}")
            raise DataError(f'"{name}" is not known here; {advice} (what is your own may lie in "metadata")')
        if value is not None:
            if known in named:
                raise DataError(f'"{known}" is given twice, also as "{name}"; leave one out')
            named[known] = value
    return named


def _settings(row: Mapping[str, Any], index: int, defaults: Defaults) -> dict[str, Any]:
    stop = row.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
        raise DataError(f'"stop" must be a text or a list of texts, none of them empty; got {stop!r:.60}')
    tokens, seed = row.get("max_new_tokens", defaults.max_new_tokens), row.get("seed")
    if type(tokens) is not int or tokens < 1:
        raise DataError(f'"max_new_tokens" must be a whole number from 1 on; got {tokens!r:.60}')
    if seed is not None and type(seed) is not int:
        raise DataError(f'"seed" must be a whole number; got {seed!r:.60}')
    temperature = _number(row, "temperature", defaults.temperature)
    if not (temperature == 0 or 0.01 <= temperature <= 100):
        raise DataError(f'"temperature" must be 0, or 0.01 to 100; got {temperature}')
    top_p = _number(row, "top_p", defaults.top_p)
    if not 0 < top_p <= 1:
        raise DataError(f'"top_p" must be above 0 and at most 1; got {top_p}')
    return {
        "max_new_tokens": tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": f"{defaults.seed}:{index}" if seed is None else seed,
        "stop": tuple(stop),
    }


def _number(row: Mapping[str, Any], name: str, default: float) -> float:
    value = row.get(name, default)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise DataError(f'"{name}" must be a number; got {value!r:.60}')
    return float(value)


def _tokens(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    if ("prompt" in row) == ("messages" in row):
        raise DataError('expected either "prompt", a text, or "messages", a conversation')
    if "messages" in row:
        if not tokenizer.chat_template:
            raise DataError('this model\'s tokenizer has no chat template; give a "prompt" instead of "messages"')
        return encode(tokenizer, render(tokenizer, read_turns(row, "messages", "the row")), add_special_tokens=False)
    if not isinstance(row["prompt"], str):
        raise DataError(f'"prompt" must be a text; got {row["prompt"]!r:.60}')
    return encode(tokenizer, row["prompt"])


def _check_length(model: PreTrainedModel, request: Request, batch_size: int) -> None:
    total = request.prompt_tokens + request.max_new_tokens
    check_context(model, total, "prompt and continuation")
    limit = _same_angles_until(model)
    if batch_size > 1 and limit is not None and total > limit:
        raise LolcatsError(
            f"beyond {limit:,} tokens this model rotates all texts of a batch by the longest of them, so a text of "
            f"{total:,} tokens (prompt and continuation) would change the others; take a batch size of 1",
            hint="batch_size",
        )


def _same_angles_until(model: PreTrainedModel) -> int | None:
    """Tokens up to which the rotary angles of a text do not depend on the others in its batch; None: any number."""
    config = model.config.get_text_config()
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    changing = [kind for kind in kinds if kind.get("rope_type") in EVERY_LENGTH]
    limits = [kind.get("original_max_position_embeddings") or config.max_position_embeddings for kind in changing]
    return min(limits, default=None)
