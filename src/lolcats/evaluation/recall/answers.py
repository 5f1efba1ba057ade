"""Greedy answers to prompts, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from lolcats.evaluation.perplexity import Variant
from lolcats.evaluation.recall.needles import Prompt
from lolcats.models.generation import own_settings
from lolcats.models.vocabulary import check_token_ids

Settled = Callable[[str, Sequence[str]], bool]


class _Settled(StoppingCriteria):
    """Ends a row as soon as its score can no longer change: the tokens that follow would be thrown away."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], width: int, settled: Settled
    ) -> None:
        self.tokenizer, self.prompts, self.width, self.settled = tokenizer, prompts, width, settled

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        done = [self.settled(text, prompt.answers) for text, prompt in zip(texts, self.prompts, strict=True)]
        return torch.tensor(done, device=input_ids.device)


@torch.no_grad()
def answer(
    variant: Variant,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    new_tokens: int,
    settled: Settled,
    batch_size: int = 4,
) -> list[str]:
    """What the model writes after each prompt, always the likeliest token.

    Prompts of one length share a batch without padding where there are enough of them; else shorter ones are padded
    at the left.

    Args:
        variant: the model in its mode.
        tokenizer: writes text.
        prompts: in any order.
        new_tokens: most tokens of an answer.
        settled: whether an answer may end; see `RecallTask`.
        batch_size: prompts at once.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids), reverse=True)
    texts = [""] * len(prompts)
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        batch = [prompts[row] for row in rows]
        with variant.mode():
            written = _generate(variant.model, tokenizer, batch, new_tokens, settled)
        for row, text in zip(rows, written, strict=True):
            texts[row] = text
    return texts


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Prompt],
    new_tokens: int,
    settled: Settled,
) -> list[str]:
    ids, mask = _left_padded([prompt.ids for prompt in batch], _filler(tokenizer))
    stop = _Settled(tokenizer, batch, ids.shape[1], settled)
    check_token_ids(ids, model, "the prompt")
    with own_settings(model, tokenizer, {}):
        written = cast(Any, model).generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=new_tokens,
            pad_token_id=_filler(tokenizer),
            stopping_criteria=StoppingCriteriaList([stop]),
            **GREEDY,
        )
    return tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)


GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
"""Whatever a model's generation settings say: a penalty for repetition would punish the right answer."""


def _filler(tokenizer: PreTrainedTokenizerBase) -> int:
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)


def _left_padded(rows: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [rows, longest]."""
    width = max(map(len, rows))
    ids = torch.tensor([[filler] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
