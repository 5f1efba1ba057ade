"""`convert`: put `LinearizedAttention` around the attention modules of a model, in place."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lolcats.config import LinearizationConfig
from lolcats.errors import LolcatsError
from lolcats.feature_maps import build_feature_map
from lolcats.modeling.attention import LinearizedAttention, Mode
from lolcats.modeling.calls import Sizes, check_calls
from lolcats.modeling.hf import mark_as_linearized
from lolcats.modeling.inputs import install_hooks
from lolcats.modeling.masks import NAME
from lolcats.modeling.plain import check_plain
from lolcats.modeling.sharing import check_sharing, keep_all_queries
from lolcats.modeling.start import match_start
from lolcats.models.vocabulary import check_token_ids
from lolcats.ops import resolve_impl
from lolcats.ops.types import HybridSpec

GLOBAL, LOCAL = "full_attention", {"sliding_attention", "chunked_attention"}
"""Types of layers that see the whole text, or the nearest tokens alone."""
OPEN_GATE = 6.0
"""Initial bias of a decay gate: sigmoid(6) = 0.9975, half of a key's weight is left after 280 tokens."""


def convert(
    model: PreTrainedModel, config: LinearizationConfig | None = None, *, input_ids: Tensor | None = None
) -> PreTrainedModel:
    """Replace softmax attention by the LoLCATs hybrid, in place. No weight of the model changes.

    Args:
        model: a decoder-only language model of transformers.
        config: what to build; None is `LinearizationConfig()`.
        input_ids: [B, N] token ids of real text, needed by `start="matched"` only (one batch is enough).

    Returns:
        The same object; its class is now a `Linearized...` subclass of its family's class.

    Raises:
        LolcatsError: the model cannot be linearized (the message says why, and nothing has changed), or `input_ids`
            is missing or holds tokens that the model does not know.
    """
    config = config or LinearizationConfig()
    if linearized_layers(model):
        raise LolcatsError("this model is already linearized; convert its teacher instead")
    check_plain(model)
    check_supported(model)
    if config.start == "matched" and input_ids is None:
        raise LolcatsError("start='matched' needs a batch of real text; pass input_ids [B, N] or use start='paper'")
    if input_ids is not None:
        check_token_ids(input_ids, model, "input_ids")
    _check_layers(model, config)  # refuse before anything changes
    mark_as_linearized(model, config)
    install(model, config)
    if config.start == "matched":
        assert input_ids is not None
        match_start(model, linearized_layers(model), input_ids)
    return model


def check_supported(model: PreTrainedModel) -> None:
    """Raise LolcatsError if `model` cannot be linearized."""
    if linearized_layers(model):
        raise LolcatsError("this model is already linearized; convert its teacher instead")
    if getattr(model.config, "is_encoder_decoder", False):
        raise LolcatsError(f"{type(model).__name__} is an encoder-decoder; expected a decoder-only language model")
    if not model.can_generate():
        raise LolcatsError(f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM")
    if not attention_modules(model):
        raise LolcatsError(f"{type(model).__name__} cannot be linearized: {_why_not(model)}")


def _check_layers(model: PreTrainedModel, config: LinearizationConfig) -> None:
    """Raise LolcatsError if one of the chosen layers cannot be linearized."""
    names, text_config = attention_modules(model), model.config.get_text_config(decoder=True)
    chosen = choose_layers(list(names), config.layers)
    check_sharing(text_config, chosen)
    sizes = {index: head_sizes(model.get_submodule(names[index]), text_config) for index in chosen}
    if not any(tensor.is_meta for tensor in model.parameters()):
        check_calls(model, sizes)


def _why_not(model: PreTrainedModel) -> str:
    """Why a model has no attention module that can be taken over."""
    if other := other_layers(model):
        kinds = sorted(set(other.values()))
        if LOCAL.issuperset(kinds):
            return "all its attention layers are local (sliding window or chunks) already"
        return (
            f"its attention layers are of type {', '.join(kinds)}, which keep or choose more than the keys of a text; "
            "only layers of type full_attention are taken over"
        )
    classes = {type(module).__name__ for module in model.modules()}
    attention = ", ".join(sorted(name for name in classes if name.endswith(("Attention", "Mixer"))))
    return (
        f"its attention ({attention or 'of which it has none'}) does not go through transformers' attention interface, "
        "where linearization replaces it; expected a model such as Llama, Mistral or Qwen"
    )


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


def install(model: PreTrainedModel, config: LinearizationConfig) -> None:
    """Wrap the chosen modules. Also used when a saved model is built again."""
    names = attention_modules(model)
    chosen = choose_layers(list(names), config.layers)
    text_config = model.config.get_text_config(decoder=True)
    inner_config = copy.copy(text_config)
    inner_config._attn_implementation_internal = NAME
    for index in chosen:
        parent_name, _, child = names[index].rpartition(".")
        parent = model.get_submodule(parent_name)
        inner = getattr(parent, child)
        wrapper = wrap(inner, config, text_config)
        inner.config = inner_config
        wrapper.model_config = model.config.get_text_config(decoder=True)
        setattr(parent, child, wrapper)
    keep_all_queries(model, text_config, chosen)
    if len(chosen) == len(self_attention(model)):
        # No softmax layer is left, so nobody needs an [N, N] mask.
        model.config._attn_implementation = NAME
    install_hooks(model)


def wrap(inner: nn.Module, config: LinearizationConfig, model_config: PretrainedConfig) -> LinearizedAttention:
    """A `LinearizedAttention` around one attention module, on the device of its weights."""
    heads, kv_heads, head_dim = head_sizes(inner, model_config)
    device = next(itertools.chain(inner.parameters(), inner.buffers())).device  # quantized weights may be buffers
    key_maps = heads if config.state_heads == "query" else kv_heads
    gate = None
    if config.decay == "gate":
        gate = nn.Linear(model_config.hidden_size, heads, dtype=torch.float32)
        nn.init.zeros_(gate.weight)
        nn.init.constant_(gate.bias, OPEN_GATE)
    maps = [build_feature_map(config.feature_map, count, head_dim, config.feature_size) for count in (heads, key_maps)]
    settings = HybridSpec(config.window, config.window_kind, config.sinks, head_dim**-0.5)
    wrapper = LinearizedAttention(inner, maps[0], maps[1], heads, settings, resolve_impl(config.impl), gate)
    for name, parameter in wrapper.attention_parameters().items():
        owner, _, leaf = name.rpartition(".")
        setattr(wrapper.get_submodule(owner), leaf, nn.Parameter(parameter.data.to(device)))
    return wrapper.train(inner.training)


def head_sizes(inner: nn.Module, config: PretrainedConfig) -> Sizes:
    """Query heads, key heads, and size of queries and keys of an attention module."""
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
    return Sizes(heads, heads if latent else kv_heads, size)


def linearized_layers(model: nn.Module) -> list[LinearizedAttention]:
    """The linearized attention layers of a model (peft wrappers are looked through), in order."""
    return [m for m in model.modules() if isinstance(m, LinearizedAttention)]


@contextmanager
def attention_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Inside, every linearized layer computes `mode`: "softmax" is the teacher, the others are controls."""
    layers = linearized_layers(model)
    before: list[Mode] = [layer.mode for layer in layers]
    try:
        for layer in layers:
            layer.mode = mode
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.mode = old
