"""`generate_batch`: text for many prompts, as many at once as there are rows in a pool.

A text that is done gives its row to the next prompt at once. What is written for a prompt does not depend on when that
is: prompts are read in groups that the order of the file decides, steps of a linearized model have one shape from the
first to the last, and draws are a row's own. So a run that was interrupted ends as it would have without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.errors import LolcatsError, is_out_of_memory
from lolcats.evaluation.store import AnswerStore
from lolcats.identity import key_of, model_identity
from lolcats.serving.pool import Pool
from lolcats.serving.requests import Defaults, Prompt, Request, read_requests
from lolcats.serving.writing import Answer, Writer

Report = Callable[[int, int, int], None]
"""Called with rows done, all rows, and tokens written so far by this call."""


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    chunk: int = 2048,
    store: AnswerStore | None = None,
    report: Report = lambda *_: None,
) -> list[Answer]:
    """Continue many texts, `batch_size` at a time; where one ends, the next begins at once.

    Args:
        model: in evaluation mode; layers with softmax attention pad what they keep to the longest text of the moment.
        tokenizer: of the model.
        prompts: texts, conversations (lists of messages), or rows as `lolcats generate` reads them from a file:
            "prompt" or "messages", and "id", "metadata", "max_new_tokens", "temperature", "top_p", "seed", "stop".
        max_new_tokens, temperature, top_p: for rows that do not say it; temperature 0 takes the likeliest token.
        seed: of rows without one, together with their index.
        batch_size: texts at once.
        chunk: tokens of a prompt that are read at a time.
        store: texts that are known already, and where new ones are kept.
        report: see `Report`.

    Returns:
        An answer for each prompt, in their order. A prompt that cannot be done has an `error` in its answer.

    Raises:
        LolcatsError: not enough memory; or a batch size above 1 for a model with layers of another kind (state spaces).
    """
    defaults = Defaults(max_new_tokens, temperature, top_p, seed)
    requests = read_requests(model, tokenizer, prompts, defaults, batch_size)
    return answer_all(model, tokenizer, requests, batch_size, chunk, store, report)


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    batch_size: int,
    chunk: int,
    store: AnswerStore | None = None,
    report: Report = lambda *_: None,
) -> list[Answer]:
    """See `generate_batch`, of requests that were read."""
    answers: dict[int, Answer] = {r.index: _refusal(r) for r in requests if r.error is not None}
    possible = [request for request in requests if request.error is None]
    identity = "" if store is None else model_identity(model, tokenizer)
    if store is not None:
        answers |= {r.index: _known(r, held) for r in possible if (held := store.get(key_of(identity, r.key)))}
    tokens = 0
    report(len(answers), len(requests), tokens)
    # As many rows as without a store: a run that was interrupted goes on with steps of the same shape.
    pool = Pool(model, min(batch_size, len(possible)), chunk)
    writer = Writer(pool, tokenizer, frozenset(answers))
    with _enough_memory(batch_size):
        for made, complete in writer.write(possible):
            tokens += made
            for answer in complete:
                answers[answer.index] = answer
                if store is not None and answer.error is None:
                    kept = {"text": answer.text, "new_tokens": answer.new_tokens, "reason": answer.finish_reason}
                    store.put(key_of(identity, requests[answer.index].key), kept)
            report(len(answers), len(requests), tokens)
    return [answers[request.index] for request in requests]


def _refusal(request: Request) -> Answer:
    tokens = request.prompt_tokens
    return Answer(request.index, request.id, None, tokens, 0, "error", request.error, request.metadata)


def _known(request: Request, held: dict[str, Any]) -> Answer:
    found = (held["text"], request.prompt_tokens, held["new_tokens"], held["reason"])
    return Answer(request.index, request.id, *found, metadata=request.metadata)


@contextmanager
def _enough_memory(batch_size: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise LolcatsError(
            f"out of memory with {batch_size} texts at once; take a smaller batch size, or shorter pieces of prompts "
            "(chunk)",
            hint="batch_size",
        ) from error
