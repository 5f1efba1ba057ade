"""Text out of a model: a thin layer over `model.generate`."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 40, **options: Any
) -> str:
    """Continuation of `prompt`, without it; greedy unless `options` of `generate` say otherwise."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids = cast(Any, model).generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=options.pop("do_sample", False), **options
    )
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
