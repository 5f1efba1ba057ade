"""Linearized models by name: `LinearizedLlamaForCausalLM` is vLLM's own `LlamaForCausalLM` with other attention."""

# pyright: reportMissingImports=false
# vLLM is not installed where the rest of the package is checked.

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.utils import WeightsMapper

from lolcats.errors import LolcatsError
from lolcats.serving.vllm_plugin.install import install
from lolcats.serving.vllm_plugin.plan import make_plan, whole_mixers
from lolcats.serving.vllm_plugin.weights import INNER, MixerWeights

PREFIX = "Linearized"
COPIES = (get_temporal_copy_spec,)
"""How vLLM copies the tensors of a page: there is one."""
NAMES = WeightsMapper(orig_to_new_substr={INNER: "."})
"""For what vLLM reads by module names beside the weights: adapters, and which modules a quantization leaves out."""


@functools.cache
def linearized_class(base: type[nn.Module]) -> type[nn.Module]:
    """vLLM's class of a family -> that of its linearized models."""

    def __init__(self: Any, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        if getattr(base, "is_hybrid", False):  # not sooner: vLLM looks at the class in a process of its own
            raise LolcatsError(f"{base.__name__} has layers with states of its own in vLLM; serve it by transformers")
        base.__init__(self, vllm_config=vllm_config, prefix=prefix, **kwargs)
        self.linearization_plan = make_plan(vllm_config, get_tensor_model_parallel_rank())
        self.linearized = install(self, vllm_config, self.linearization_plan)

    def load_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        mixers = MixerWeights()
        loaded = base.load_weights(self, mixers.family(weights))  # type: ignore[attr-defined]
        own, plan = {index: layer.mixer for index, layer in self.linearized.items()}, self.linearization_plan
        mixers.load(own, whole_mixers(plan), plan.shard)
        return {name for name, _ in self.named_parameters() if ".mixer." in name} | (loaded or set())

    def shapes(cls: type, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return ((make_plan(vllm_config).page_bytes,),)

    attributes = {
        "__init__": __init__,
        "__module__": __name__,
        "load_weights": load_weights,
        "hf_to_vllm_mapper": getattr(base, "hf_to_vllm_mapper", WeightsMapper()) | NAMES,
        "is_hybrid": True,
        "has_inner_state": True,
        "supports_mamba_prefix_caching": True,
        "get_mamba_state_shape_from_config": classmethod(shapes),
        "get_mamba_state_dtype_from_config": classmethod(lambda cls, _: (torch.uint8,)),
        "get_mamba_state_copy_func": classmethod(lambda cls: COPIES),
        "get_mamba_state_copy_funcs": classmethod(lambda cls, types: dict.fromkeys(types, COPIES)),
    }
    return type(f"{PREFIX}{base.__name__}", (base,), attributes)


def __getattr__(name: str) -> Any:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return linearized_class(ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls())
