"""Tiny settings of the families that the tests build one of each."""

from __future__ import annotations

from typing import Any, NamedTuple


class Family(NamedTuple):
    """Settings of a tiny model and the layers that are converted."""

    settings: dict[str, Any]
    layers: tuple[int, ...] = (0, 1, 2)


LOCAL_GLOBAL = ["sliding_attention", "full_attention", "full_attention"]
MIXED = {"layer_types": LOCAL_GLOBAL, "sliding_window": 6}
OWN_HEADS = {"num_key_value_heads": None, "head_dim": None}  # a key head a query head, of hidden_size / heads
MLA = {
    "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": None,
}  # fmt: skip
FAMILIES: dict[str, Family] = {
    "llama": Family({"attention_bias": True}),
    "mistral": Family({"sliding_window": None}),
    "ministral": Family(MIXED, (1, 2)),
    "qwen2": Family({"use_sliding_window": True, **MIXED}, (1, 2)),
    "qwen3": Family({}),
    "phi": Family({}),
    "phi3": Family({"sliding_window": None}),
    "gemma2": Family({"attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8, **MIXED}, (1, 2)),
    "gemma3_text": Family(MIXED, (1, 2)),
    "olmo2": Family({}),
    "smollm3": Family({"no_rope_layers": [1, 0, 1]}),
    "gpt_neox": Family(OWN_HEADS),
    "gpt2": Family(OWN_HEADS),
    "opt": Family({**OWN_HEADS, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "stablelm": Family({"qk_layernorm": True, "use_parallel_residual": True}),
    "granite": Family({"attention_multiplier": 0.2, "logits_scaling": 3.0}),
    "cohere": Family({"logit_scale": 0.4}),
    "cohere2": Family({"logit_scale": 0.4, **MIXED}, (1, 2)),
    "glm4": Family({}),
    "mixtral": Family({"sliding_window": None, "num_local_experts": 3}),
    "qwen3_moe": Family({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
    "deepseek_v3": Family(MLA),
    "gpt_oss": Family({"num_local_experts": 4, "num_experts_per_tok": 2, **MIXED}, (1, 2)),
}
