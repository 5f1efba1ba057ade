"""Settings of vLLM: what a linearized model changes in them, what it refuses, and what it says before it loads."""

# pyright: reportMissingImports=false
# vLLM is not installed where the rest of the package is checked.

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from lolcats.errors import LolcatsError
from lolcats.printable import show_bytes
from lolcats.serving.vllm_plugin.memory import state_memory
from lolcats.serving.vllm_plugin.model import PREFIX
from lolcats.serving.vllm_plugin.plan import linearization, make_plan, whole_sizes
from lolcats.serving.vllm_plugin.shard import check_shards
from lolcats.version import __version__

logger = init_logger(f"vllm.{__name__}")


class StatefulModelConfig(ModelConfig):
    """vLLM's settings of a model; it takes one whose layers all see the whole text for one without states."""

    @property
    def is_hybrid(self) -> bool:
        """It has states."""
        return True


class LinearizedModelConfig(VerifyAndUpdateConfig):
    """Runs the family's own changes, then those of a linearized model."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Make vLLM see a model with states."""
        if (family := _family(model_config)) is not None:
            family.verify_and_update_model_config(model_config)
        model_config.__class__ = StatefulModelConfig

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuse what cannot be done, and tell what the states take.

        Raises:
            LolcatsError: the message says what.
        """
        if (family := _family(vllm_config.model_config)) is not None:
            family.verify_and_update_config(vllm_config)
        refuse(vllm_config)
        tell_memory(vllm_config)
        if isinstance(vllm_config.additional_config, dict):
            # vLLM keeps compiled models under a hash of this among others.
            settings = linearization(vllm_config).model_dump(mode="json")
            vllm_config.additional_config |= {"lolcats": [__version__, settings]}


def _family(model_config: ModelConfig) -> type[VerifyAndUpdateConfig] | None:
    return MODELS_CONFIG_MAP.get(model_config.architecture.removeprefix(PREFIX))


def refuse(vllm_config: VllmConfig) -> None:
    """Raise LolcatsError where the settings ask for what linearized models do not do."""
    parallel = vllm_config.parallel_config
    wanted = {
        f"pipeline_parallel_size {parallel.pipeline_parallel_size}; use 1": parallel.pipeline_parallel_size > 1,
        "context parallelism: a state has no tokens to divide; leave the context_parallel_sizes at 1":
            max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
        "speculative decoding: tokens cannot be taken back from a state; leave the speculative_config out":
            vllm_config.speculative_config is not None,
        "a kv_transfer_config: states are not sent between servers": vllm_config.kv_transfer_config is not None,
    }  # fmt: skip
    for what, asked in wanted.items():
        if asked:
            raise LolcatsError(f"a linearized model cannot be served with {what}")
    values = linearization(vllm_config).values()
    check_shards(parallel.tensor_parallel_size, whole_sizes(vllm_config), values)


def tell_memory(vllm_config: VllmConfig) -> None:
    """Log what a request's states take, and warn where not all requests that may run at once can."""
    plan, limit = make_plan(vllm_config), vllm_config.scheduler_config.max_num_seqs
    each = plan.request_bytes
    logger.info(
        "lolcats: %d linearized layers, whose states take %s for each request%s, however long",
        len(plan.layers), show_bytes(each), " on each device" if plan.shard.ranks > 1 else "",
    )  # fmt: skip
    memory = state_memory(vllm_config)
    if memory is None:
        return
    fit = max(0, memory // (len(plan.pages) * plan.page_bytes) - 1)  # vLLM keeps one page for nobody
    if fit < 1:
        raise LolcatsError(
            f"the states of a request take {show_bytes(each)}, and vLLM has about {show_bytes(memory)} for all; give "
            "it more (gpu_memory_utilization, on the CPU VLLM_CPU_KVCACHE_SPACE)"
        )
    if fit < limit:
        logger.warning(
            "lolcats: about %d requests fit into memory at once, and max_num_seqs is %d: the others wait. Set "
            "max_num_seqs to %d, or give vLLM more memory", fit, limit, fit,
        )  # fmt: skip


class Refused(nn.Module):
    """Stands for a linearized model that cannot be served; `RefusedConfig` says so before it is made."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """What vLLM looks for in a model of texts."""
        raise NotImplementedError

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """See above."""
        raise NotImplementedError

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """See above."""
        raise NotImplementedError


def refused_config(reason: str) -> Any:
    """What raises this reason as soon as vLLM has read a model's config."""

    class RefusedConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_model_config(model_config: ModelConfig) -> None:
            raise LolcatsError(reason)

    return RefusedConfig
