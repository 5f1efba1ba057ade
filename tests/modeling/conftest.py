"""Tiny random models of other families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(family: str, **changes: Any) -> Any:
    """A random model of a family; a size changed to None is left to the family."""
    torch.manual_seed(0)
    settings = {name: value for name, value in (SIZES | changes).items() if name not in SIZES or value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    model.generation_config.eos_token_id = None  # texts of a fixed length
    return model


@pytest.fixture(name="build")
def build_fixture() -> Callable[..., Any]:
    """See `build`."""
    return build
