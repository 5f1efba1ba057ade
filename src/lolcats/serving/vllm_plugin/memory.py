"""How much memory vLLM will have for states, as far as it can be told before a model is loaded."""

# pyright: reportMissingImports=false
# vLLM is not installed where the rest of the package is checked.

from __future__ import annotations

from pathlib import Path

from vllm.config import VllmConfig
from vllm.platforms import current_platform


def state_memory(vllm_config: VllmConfig) -> int | None:
    """Bytes on each device, about; None where it cannot be told."""
    cache = vllm_config.cache_config
    given = getattr(cache, "kv_cache_memory_bytes", None)
    if given is not None:
        return int(given)
    if current_platform.is_cpu():
        import vllm.envs as envs  # here, since it reads the environment

        return None if not envs.VLLM_CPU_KVCACHE_SPACE else int(envs.VLLM_CPU_KVCACHE_SPACE * 2**30)
    if not current_platform.is_cuda():
        return None
    total = current_platform.get_device_total_memory()  # without a context on the device
    weights = weight_bytes(vllm_config.model_config.model) // vllm_config.parallel_config.tensor_parallel_size
    return max(0, int(total * cache.gpu_memory_utilization) - weights)


def weight_bytes(model: str) -> int:
    """Size of a folder's weights; 0 of a model that is no folder."""
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
