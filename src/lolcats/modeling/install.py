"""Putting mixers into a model: around its attention modules, in place. No weight changes."""

from __future__ import annotations

import copy
import itertools

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lolcats.config import LinearizationConfig
from lolcats.mixers import build_mixer
from lolcats.modeling.attention import LinearizedAttention
from lolcats.modeling.inputs import install_hooks
from lolcats.modeling.masks import NAME
from lolcats.modeling.modules import attention_modules, choose_layers, head_sizes, self_attention
from lolcats.modeling.sharing import keep_all_queries


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
    device = next(itertools.chain(inner.parameters(), inner.buffers())).device  # quantized weights may be buffers
    mixer = build_mixer(config.mixer, head_sizes(inner, model_config), **config.values())
    return LinearizedAttention(inner, mixer.to(device)).train(inner.training)
