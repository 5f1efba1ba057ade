"""What a linearized model needs of vLLM, told from its settings before a weight is loaded."""

# pyright: reportMissingImports=false
# vLLM is not installed where the rest of the package is checked.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig

from lolcats.config import LinearizationConfig
from lolcats.mixers import Mixer, Sizes, StateSpec, build_mixer
from lolcats.modeling.modules import GLOBAL, choose_layers
from lolcats.serving.vllm_plugin.layout import PageLayout
from lolcats.serving.vllm_plugin.shard import Shard


class Plan(NamedTuple):
    """The linearized layers of a model and the pages that their states lie in."""

    config: LinearizationConfig
    layers: tuple[int, ...]
    """Indices in the model."""
    whole: Sizes
    """Of what arrives at a layer on all devices together."""
    shard: Shard
    """This device."""
    specs: tuple[StateSpec, ...]
    """Of each layer's state on this device."""
    pages: tuple[PageLayout, ...]
    """One of all layers where no other layer keeps anything, else one for each: vLLM gives the pages of different kinds
    of layers one size, which shall not be that of a whole model's states. vLLM wants pages of all devices to have one
    size too, so they have that of the largest."""

    @property
    def page_bytes(self) -> int:
        """Of the largest page, which all of them have in memory."""
        return max(page.nbytes for page in self.pages)

    @property
    def request_bytes(self) -> int:
        """Of the states of one request, on each device."""
        return sum(page.nbytes for page in self.pages)


def linearization(vllm_config: VllmConfig) -> LinearizationConfig:
    """The settings in the model's config."""
    return LinearizationConfig(**vllm_config.model_config.hf_config.linearization)


def make_plan(vllm_config: VllmConfig, rank: int = 0) -> Plan:
    """From the config alone; the model itself must turn out to have these layers (`install`).

    Args:
        vllm_config: of the model.
        rank: of this device, where a model is divided over several.
    """
    config, model = linearization(vllm_config), vllm_config.model_config
    layers = choose_layers(global_layers(model.hf_text_config), config.layers)
    whole, ranks = whole_sizes(vllm_config), vllm_config.parallel_config.tensor_parallel_size
    alone = len(layers) == model.hf_text_config.num_hidden_layers
    shards = [Shard(number, ranks) for number in range(ranks)]
    specs = [_specs(config, whole, shard, len(layers), model.dtype) for shard in shards]
    pages = [(PageLayout.of(own),) if alone else tuple(PageLayout.of([spec]) for spec in own) for own in specs]
    largest = [max(page.nbytes for page in same) for same in zip(*pages, strict=True)]
    own = tuple(page._replace(nbytes=nbytes) for page, nbytes in zip(pages[rank], largest, strict=True))
    return Plan(config, tuple(layers), whole, shards[rank], specs[rank], own)


def _specs(
    config: LinearizationConfig, whole: Sizes, shard: Shard, count: int, dtype: torch.dtype
) -> tuple[StateSpec, ...]:
    with torch.device("meta"):
        mixers = [make_mixer(config, whole, place, shard) for place in range(count)]
    return tuple(mixer.state_spec(dtype) for mixer in mixers)


def make_mixer(config: LinearizationConfig, whole: Sizes, place: int, shard: Shard) -> Mixer:
    """A device's part of the mixer of the linearized layer of this number; its parameters mean nothing yet."""
    values = shard.values(config.values(place), whole)
    return build_mixer(config.mixer, shard.sizes(whole), **values).requires_grad_(False)


def whole_mixers(plan: Plan) -> dict[int, Mixer]:
    """The mixers with the heads of all devices, by the index of their layers; without memory for their parameters."""
    with torch.device("meta"):
        return {index: make_mixer(plan.config, plan.whole, place, Shard()) for place, index in enumerate(plan.layers)}


def whole_sizes(vllm_config: VllmConfig) -> Sizes:
    """Of what arrives at a layer on all devices together."""
    model = vllm_config.model_config
    size, heads = model.get_head_size(), model.model_arch_config.total_num_attention_heads
    return Sizes(heads, model.get_total_num_kv_heads(), size, size, model.hf_text_config.hidden_size)


def global_layers(config: Any) -> list[int]:
    """Indices of the layers that see the whole text."""
    count, types = config.num_hidden_layers, getattr(config, "layer_types", None)
    return [index for index in range(count) if types is None or types[index] == GLOBAL]
