"""Linearized models of many families write in vLLM what they write by `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.model_executor.models import ModelRegistry  # pyright: ignore[reportMissingImports]
from vllm.plugins import load_general_plugins  # pyright: ignore[reportMissingImports]

from lolcats import LinearizationConfig, convert
from lolcats.serving.vllm_plugin import model as plugin
from tiny import perturb
from vllm_plugin.equality import FEW, assert_same, by_vllm, written_by
from vllm_plugin.test_offline import EXACT

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {
    "mixer": "blend", "window": 16, "sinks": 4, "kept": {"pairs": 12, "score": "learned", "fade": 400},
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.2, "max_position_embeddings": 1024,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDE = {"num_attention_heads": 2, "num_key_value_heads": 1}
"""Of families whose heads divide the hidden size: vLLM's own attention takes no smaller ones."""
FULL = ["full_attention", "full_attention"]
MIXED = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": WIDE,
    "exaone4": {"layer_types": FULL, "sliding_window": None},
    "gemma2": {"layer_types": FULL, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0},
    "gemma3_text": MIXED,
    "granite": WIDE,
    "llama": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256,
        },
    },
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None},
    "phi3": WIDE,
    "qwen2": WIDE,
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    "stablelm": WIDE,
}  # fmt: skip


def show_class(architecture: str) -> None:
    """Give vLLM a class at once, which it else looks at in a process of its own, for half a minute."""
    load_general_plugins()
    ModelRegistry.register_model(architecture, getattr(plugin, architecture))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family: str, tmp_path: Path) -> None:
    sizes = SIZES | FAMILIES[family]
    if "num_attention_heads" in FAMILIES[family]:
        del sizes["head_dim"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    convert(model, LinearizationConfig(**SETTINGS))
    perturb(model).save_pretrained(tmp_path)
    show_class(type(model).__name__)
    assert_same(by_vllm(tmp_path, lengths=FEW)[0], written_by(model, FEW), EXACT)
