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


class Plan(NamedTuple):
    """The linearized layers of a model and the pages that their states lie in."""

    config: LinearizationConfig
    layers: tuple[int, ...]
    """Indices in the model."""
    specs: tuple[StateSpec, ...]
    """Of each."""
    pages: tuple[PageLayout, ...]
    """One of all layers where no other layer keeps anything, else one for each: vLLM gives the pages of different kinds
    of layers one size, which shall not be that of a whole model's states."""

    @property
    def page_bytes(self) -> int:
        """Of the largest page, which all of them have in memory."""
        return max(page.nbytes for page in self.pages)

    @property
    def request_bytes(self) -> int:
        """Of the states of one request."""
        return sum(page.nbytes for page in self.pages)


def linearization(vllm_config: VllmConfig) -> LinearizationConfig:
    """The settings in the model's config."""
    return LinearizationConfig(**vllm_config.model_config.hf_config.linearization)


def make_plan(vllm_config: VllmConfig) -> Plan:
    """From the config alone; the model itself must turn out to have these layers (`install`)."""
    config, model = linearization(vllm_config), vllm_config.model_config
    available = global_layers(model.hf_text_config)
    layers = choose_layers(available, config.layers)
    sizes = sizes_of(vllm_config)
    with torch.device("meta"):
        mixers = [make_mixer(config, sizes, place) for place in range(len(layers))]
    specs = tuple(mixer.state_spec(model.dtype) for mixer in mixers)
    alone = len(layers) == model.hf_text_config.num_hidden_layers
    pages = (PageLayout.of(specs),) if alone else tuple(PageLayout.of([spec]) for spec in specs)
    return Plan(config, tuple(layers), specs, pages)


def make_mixer(config: LinearizationConfig, sizes: Sizes, place: int) -> Mixer:
    """The mixer of the linearized layer of this number; its parameters mean nothing yet."""
    return build_mixer(config.mixer, sizes, **config.values(place)).requires_grad_(False)


def sizes_of(vllm_config: VllmConfig) -> Sizes:
    """Of what arrives at the layers."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    size = model.get_head_size()
    heads, kv_heads = model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel)
    return Sizes(heads, kv_heads, size, size, model.hf_text_config.hidden_size)


def global_layers(config: Any) -> list[int]:
    """Indices of the layers that see the whole text."""
    count, types = config.num_hidden_layers, getattr(config, "layer_types", None)
    return [index for index in range(count) if types is None or types[index] == GLOBAL]
