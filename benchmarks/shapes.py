"""Models that several benchmarks take by name."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lolcats


def load(name: str, device: torch.device) -> Any:
    """A teacher in bfloat16."""
    if name != "llama-3-8b-shape":
        return lolcats.load_teacher(name, dtype=torch.bfloat16, device=device)[0]
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model
