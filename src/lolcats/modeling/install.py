"""Putting mixers into a model: around its attention modules, in place. No weight changes."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lolcats.config import LinearizationConfig
from lolcats.errors import LolcatsError
from lolcats.mixers import Mixer, Sizes, build_mixer, equal_tokens
from lolcats.mixers.near_heads import read_split
from lolcats.modeling.attention import LinearizedAttention, linearized_layers
from lolcats.modeling.inputs import install_hooks
from lolcats.modeling.masks import NAME
from lolcats.modeling.modules import attention_modules, choose_layers, head_sizes, self_attention
from lolcats.modeling.sharing import keep_all_queries
from lolcats.placing import computes_on

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Of keys and values."""


def install(model: PreTrainedModel, config: LinearizationConfig) -> None:
    """Wrap the chosen modules. Also used when a saved model is built again."""
    names = attention_modules(model)
    chosen = choose_layers(list(names), config.layers)
    text_config = model.config.get_text_config(decoder=True)
    check_fits(config, {index: head_sizes(model.get_submodule(names[index]), text_config) for index in chosen})
    inner_config = copy.copy(text_config)
    inner_config._attn_implementation_internal = NAME
    for place, index in enumerate(chosen):
        parent_name, _, child = names[index].rpartition(".")
        parent = model.get_submodule(parent_name)
        inner = getattr(parent, child)
        wrapper = wrap(inner, config, text_config, place)
        inner.config = inner_config
        wrapper.model_config = model.config.get_text_config(decoder=True)
        wrapper.rotary.look_in(model)
        setattr(parent, child, wrapper)
    if getattr(config, "split", None) is not None:
        share_window(linearized_layers(model))
    keep_all_queries(model, text_config, chosen)
    if len(chosen) == len(self_attention(model)):
        # No softmax layer is left, so nobody needs an [N, N] mask.
        model.config._attn_implementation = NAME
    install_hooks(model)


def check_fits(config: LinearizationConfig, sizes: dict[int, Sizes]) -> None:
    """Raise LolcatsError where a split is not one for these layers: index -> sizes, in order."""
    split = getattr(config, "split", None)
    if split is None:
        return
    if len(split) != len(sizes):
        raise LolcatsError(f"linearization.split: expected an entry for each of {len(sizes)} linearized layers; got "
                           f"{len(split)}; set it to null to have it found, or leave layers out")  # fmt: skip
    for entry, (index, layer) in zip(split, sizes.items(), strict=True):
        try:
            read_split(entry, layer.kv_heads)
        except ValueError as error:
            raise LolcatsError(f"linearization.split, layer {index}: {error}") from error


def wrap(
    inner: nn.Module, config: LinearizationConfig, model_config: PretrainedConfig, place: int
) -> LinearizedAttention:
    """A `LinearizedAttention` around one attention module, on the device of its weights.

    `place` is its number among the linearized layers.
    """
    mixer = _make_mixer(inner, config, head_sizes(inner, model_config), place)
    return LinearizedAttention(inner, mixer).train(inner.training)


def _make_mixer(inner: nn.Module, config: LinearizationConfig, sizes: Sizes, place: int) -> Mixer:
    device = next(itertools.chain(inner.parameters(), inner.buffers())).device  # quantized weights may be buffers
    return build_mixer(config.mixer, sizes, **config.values(place)).to(computes_on(inner) or device)


def give_split(layers: list[LinearizedAttention], config: LinearizationConfig) -> None:
    """Replace the mixers of linearized layers by those of settings whose split is known by now."""
    for place, layer in enumerate(layers):
        layer.mixer = _make_mixer(layer.inner, config, layer.mixer.sizes, place).train(layer.training)
    share_window(layers)


def share_window(layers: list[LinearizedAttention]) -> None:
    """Tell layers that share a budget how many tokens a window may have that takes as much in all of them together."""
    tokens = {dtype: equal_tokens([layer.mixer for layer in layers], dtype) for dtype in DTYPES}
    for layer in layers:
        layer.window_tokens = tokens
