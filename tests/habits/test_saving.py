"""Saving, loading and copying."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)

from lolcats.modeling import linearized_layers


def test_save_and_load(model: Any, tokenizer: Any, inputs: Any) -> None:
    model.save_pretrained("copy")
    tokenizer.save_pretrained("copy")
    again: Any = AutoModelForCausalLM.from_pretrained("copy")
    config: Any = AutoConfig.from_pretrained("copy")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert type(again) is type(model) and len(linearized_layers(again)) == 3
    assert (config.model_type, config.base_model_type) == ("lolcats", "llama")


def test_generation_settings_are_saved(model: Any, inputs: Any) -> None:
    settings = GenerationConfig(do_sample=False, max_new_tokens=7, repetition_penalty=1.3, pad_token_id=0)
    text = model.generate(**inputs, generation_config=settings)
    model.generation_config = settings
    model.save_pretrained("settings")
    again: Any = AutoModelForCausalLM.from_pretrained("settings")
    assert again.generation_config.max_new_tokens == 7
    assert torch.equal(again.generate(**inputs), text)


def test_copy_and_pickle(model: Any, inputs: Any) -> None:
    twin = copy.deepcopy(model)
    sent = pickle.loads(pickle.dumps(model))
    assert type(sent) is type(model)
    for other in (twin, sent):
        assert torch.equal(other(**inputs).logits, model(**inputs).logits)


def test_new_tokens(model: Any, tokenizer: Any) -> None:
    tokenizer.add_tokens(["<river>"])
    model.resize_token_embeddings(len(tokenizer))
    ids = tokenizer("The <river> runs", return_tensors="pt")["input_ids"]
    assert len(tokenizer) - 1 in ids and model(ids).logits.shape[-1] == len(tokenizer)
    model.save_pretrained("resized")
    again: Any = AutoModelForCausalLM.from_pretrained("resized")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_state_dicts_and_counts(model: Any, inputs: Any) -> None:
    torch.save(model.state_dict(), "weights.pt")
    empty: Any = AutoModelForCausalLM.from_config(model.config).eval()
    empty.load_state_dict(torch.load("weights.pt"))
    assert torch.equal(empty(**inputs).logits, model(**inputs).logits)
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.get_memory_footprint() > 0


def test_other_auto_classes_are_refused(folder: str) -> None:
    """The decoder without its head is the `base_model` of what AutoModelForCausalLM loads."""
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForSequenceClassification.from_pretrained(folder)
