"""Models with random weights, for measurements that do not depend on what the weights are."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from lolcats.models.config import read_model_config
from lolcats.models.folder import check_place, expand_model
from lolcats.models.teacher import explained, load_teacher

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b-shape": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    },
    "llama-3-70b-shape": {
        "vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    },
    "llama-3-405b-shape": {
        "vocab_size": 128_256, "hidden_size": 16_384, "intermediate_size": 53_248, "num_hidden_layers": 126,
        "num_attention_heads": 128, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    },
}  # fmt: skip
"""Sizes of Llamas by name; those of 70B and 405B are Llama 3.1's."""


def random_model(source: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of which only the configuration is read, in evaluation.

    Args:
        source: a name of `SHAPES`, a hub name, or a folder with config.json.
        dtype: of its weights.
        device: where it is made.

    Raises:
        LolcatsError: there is no such configuration, or no model can be made of it.
    """
    with explained(source), device:
        return AutoModelForCausalLM.from_config(config_of(source), dtype=dtype, trust_remote_code=False).eval()


def load_or_make(source: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model as `load_teacher` loads it, or one of `SHAPES` with random weights."""
    if source in SHAPES:
        return random_model(source, dtype, device)
    return load_teacher(source, dtype=dtype, device=device)[0]


def config_of(source: str) -> PretrainedConfig:
    """The configuration of a name of `SHAPES`, or of a model in a folder or on the hub.

    Raises:
        LolcatsError: see `read_model_config`.
    """
    if source in SHAPES:
        return LlamaConfig(**SHAPES[source])
    source = expand_model(source)
    check_place(source)
    return read_model_config(source)
