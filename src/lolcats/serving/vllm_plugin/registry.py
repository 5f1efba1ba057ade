"""Telling vLLM of linearized models."""

# pyright: reportMissingImports=false
# vLLM is not installed where the rest of the package is checked.

from __future__ import annotations

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP

import lolcats.modeling.hf  # noqa: F401  # teaches AutoConfig the model type lolcats
from lolcats.serving.vllm_plugin.config import LinearizedModelConfig, Refused, refused_config
from lolcats.serving.vllm_plugin.model import PREFIX


def register_models(refusal: str | None) -> None:
    """Register the linearized models of every family of transformers' causal language models.

    Args:
        refusal: why none of them can be served, or None.
    """
    known = set(ModelRegistry.get_supported_archs())
    families = {str(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    if refusal is None:
        _register_layer()
    for family in sorted(families):
        name = f"{PREFIX}{family}"
        if name in known:
            continue
        reason = refusal or family_refusal(family, known)
        if reason is None:
            ModelRegistry.register_model(name, f"lolcats.serving.vllm_plugin.model:{name}")
            MODELS_CONFIG_MAP[name] = LinearizedModelConfig
        else:
            ModelRegistry.register_model(name, Refused)
            MODELS_CONFIG_MAP[name] = refused_config(f"{reason}; `transformers serve` can serve it")


def family_refusal(family: str, known: set[str]) -> str | None:
    """Why linearized models of a family cannot be served by vLLM, or None; `known` are the families that it has."""
    if family not in known:
        return f"vLLM has no {family}, so it cannot serve linearized ones"
    if getattr(ModelRegistry.models[family], "module_name", "").endswith(".transformers"):
        return f"vLLM runs {family} by the code of transformers, where linearized layers cannot be put in"
    return None


def _register_layer() -> None:
    from vllm.config import CompilationConfig
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend

    from lolcats.serving.vllm_plugin.layer import OPERATION

    # CUSTOM is the name that vLLM keeps for others.
    register_backend(
        MambaAttentionBackendEnum.CUSTOM, "lolcats.serving.vllm_plugin.metadata.StateBackend", is_mamba=True
    )
    if OPERATION not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(OPERATION)  # compiled graphs are split there
