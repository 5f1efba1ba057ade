"""Caches: kept between calls, copied, and taken back by a call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from lolcats import LolcatsError


def test_continue_a_conversation(model: Any, tokenizer: Any, inputs: Any) -> None:
    first = model.generate(**inputs, do_sample=False, max_new_tokens=8, return_dict_in_generate=True)
    question = tokenizer(" And who lived there?", return_tensors="pt")["input_ids"]
    ids = torch.cat([first.sequences, question], 1)
    more = model.generate(ids, past_key_values=first.past_key_values, do_sample=False, max_new_tokens=8)
    assert torch.equal(more, model.generate(ids, do_sample=False, max_new_tokens=8))


@pytest.mark.slow
def test_several_texts_from_one_prompt(model: Any, tokenizer: Any, inputs: Any) -> None:
    """A cache is used up by what is generated from it; a copy of it is small."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    for ending in (" a green valley", " the old mill"):
        ids = torch.cat([inputs["input_ids"], tokenizer(ending, return_tensors="pt")["input_ids"]], 1)
        text = model.generate(ids, past_key_values=copy.deepcopy(cache), do_sample=False, max_new_tokens=8)
        assert torch.equal(text, model.generate(ids, do_sample=False, max_new_tokens=8))


def test_long_text_in_segments(model: Any, tokenizer: Any) -> None:
    """The cache goes from one call to the next by hand as well."""
    ids = tokenizer("The river runs through a green valley. " * 8, return_tensors="pt")["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split(20, dim=1)]
        assert torch.allclose(torch.cat(parts, 1), model(ids).logits, atol=1e-3)
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("draft", ["lookup", "assistant", "early exit"])
def test_assisted_generation(model: Any, inputs: Any, draft: str) -> None:
    options = {
        "lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": copy.deepcopy(model)},
        "early exit": {"assistant_early_exit": 1},
    }[draft]
    text = model.generate(**inputs, do_sample=False, max_new_tokens=8, **options)
    assert torch.equal(text, model.generate(**inputs, do_sample=False, max_new_tokens=8))


def test_crop_the_last_call_from_a_cache(model: Any, inputs: Any) -> None:
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        model(inputs["input_ids"][:, :4], past_key_values=cache)
    cache.crop(-3)
    with pytest.raises(LolcatsError, match="crop"):
        cache.crop(-2)


def test_continuous_batching_is_refused(model: Any, inputs: Any) -> None:
    with pytest.raises(LolcatsError, match="left padding"):
        model.generate_batch([inputs["input_ids"][0].tolist()])
    assert not hasattr(model, "init_continuous_batching")  # what `transformers serve` asks
