"""The attention modules of a family's model: which go through transformers' interface, of what type and size."""

from __future__ import annotations

import inspect
from typing import Any, cast

from torch import nn
from transformers import PretrainedConfig

from lolcats.errors import LolcatsError
from lolcats.mixers import Sizes

GLOBAL, LOCAL = "full_attention", {"sliding_attention", "chunked_attention"}
"""Types of layers that see the whole text, or the nearest tokens alone."""


def attention_modules(model: nn.Module) -> dict[int, str]:
    """Layer index -> name of each global attention module that can be taken over. Local (sliding) ones are left out."""
    return {index: name for index, name, module in self_attention(model) if layer_type(module, index) == GLOBAL}


def other_layers(model: nn.Module) -> dict[int, str]:
    """Layer index -> type of each attention module that goes through the interface and is left as it is."""
    found = {index: layer_type(module, index) for index, _, module in self_attention(model)}
    return {index: kind for index, kind in found.items() if kind != GLOBAL}


def self_attention(model: nn.Module) -> list[tuple[int, str, nn.Module]]:
    """(layer index, name, module) of what calls the interface, in order; attention to another text is left out."""
    found = []
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        crosses = any("cross" in part or part.startswith("encoder_att") for part in name.split("."))
        if index is not None and not crosses and calls_interface(module):
            found.append((int(index), name, module))
    return sorted(found, key=lambda item: item[0])


def calls_interface(module: nn.Module) -> bool:
    """Whether the module's forward looks up its attention function in transformers' interface."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def layer_type(module: nn.Module, index: int) -> str:
    """The type of an attention layer, in the words of transformers' `layer_types`."""
    config = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if types is not None:
        return types[index] if index < len(types) else GLOBAL
    window = getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)
    local = window is not None and getattr(config, "use_sliding_window", True)
    return "sliding_attention" if local else GLOBAL


def is_local(module: nn.Module, index: int) -> bool:
    """Whether the layer attends to a part of the text already."""
    return layer_type(module, index) in LOCAL


def choose_layers(available: list[int], layers: str | list[int] | float) -> list[int]:
    """Layers to convert. A fraction takes them evenly spaced, the last one included.

    Raises:
        LolcatsError: a layer that is not available.
    """
    if layers == "all":
        return available
    if isinstance(layers, list):
        total = max(available) + 1
        wanted = sorted(i + total if i < 0 else i for i in layers)
        if missing := [i for i in wanted if i not in available]:
            raise LolcatsError(f"layers {missing} cannot be linearized; this model's global layers are {available}")
        return wanted
    count = max(1, round(float(layers) * len(available)))
    return [available[(i + 1) * len(available) // count - 1] for i in range(count)]


def head_sizes(inner: nn.Module, config: PretrainedConfig) -> Sizes:
    """Numbers of heads and sizes of an attention module."""
    module, settings = cast(Any, inner), cast(Any, config)
    if getattr(config, "is_heterogeneous", False):  # layers of different sizes
        settings = settings.per_layer_config[int(module.layer_idx)]

    def first(*places: tuple[Any, str]) -> int | None:
        return next((int(v) for place, name in places if (v := getattr(place, name, None))), None)

    heads = first((module, "num_heads"), (settings, "num_attention_heads"))
    if heads is None:
        raise LolcatsError(f"{type(config).__name__} does not say how many heads {type(inner).__name__} has")
    groups, own = first((module, "num_key_value_groups")), (module, "num_key_value_heads")
    kv_heads = heads // groups if groups else first(own, (settings, "num_key_value_heads")) or heads
    # Multi-head latent attention has three sizes, and its `head_dim` is none of those that arrive here.
    latent = first((module, "qk_head_dim"))
    size = latent or first((module, "head_dim"), (settings, "head_dim")) or settings.hidden_size // heads
    values = first((module, "v_head_dim")) or size
    hidden = first((settings, "hidden_size"), (config, "hidden_size"))
    if hidden is None:
        raise LolcatsError(f"{type(config).__name__} does not say the size of its hidden states (hidden_size)")
    return Sizes(heads, heads if latent else kv_heads, size, values, hidden)
