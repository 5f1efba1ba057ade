"""Putting `LinearizedAttention` into a model of vLLM, in the place of `Attention` modules."""

# pyright: reportMissingImports=false
# vLLM is not installed where the rest of the package is checked.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import AttentionType

from lolcats.errors import LolcatsError
from lolcats.mixers import Sizes
from lolcats.serving.vllm_plugin.layer import Facts, Inputs, LinearizedAttention
from lolcats.serving.vllm_plugin.pages import StatePages
from lolcats.serving.vllm_plugin.plan import Plan, make_mixer
from lolcats.serving.vllm_plugin.rotary import check_rotary, extend_rotaries, reach_of, rotary_of


def install(model: nn.Module, vllm_config: VllmConfig, plan: Plan) -> dict[int, LinearizedAttention]:
    """Replace the chosen attention modules of a model that vLLM has just built; their layers by index.

    Raises:
        LolcatsError: the model is not what its settings say, or does what a mixer here does not see.
    """
    # vLLM builds models in the format of their weights; mixers and their states have formats of their own.
    with set_default_torch_dtype(torch.float32):
        return _install(model, vllm_config, plan)


def _install(model: nn.Module, vllm_config: VllmConfig, plan: Plan) -> dict[int, LinearizedAttention]:
    found = global_attention(model)
    if missing := [index for index in plan.layers if index not in found]:
        raise LolcatsError(
            f"expected attention over the whole text in layers {list(plan.layers)} of vLLM's "
            f"{type(model).__name__}; it has none in {missing}"
        )
    if beyond(vllm_config):
        extend_rotaries(model, vllm_config.model_config.max_model_len)
    inputs = Inputs()
    layers = {
        index: _replace(model, found[index], plan, place, inputs, vllm_config)
        for place, index in enumerate(plan.layers)
    }
    _allocate(layers, plan, vllm_config)
    return layers


def context_of(vllm_config: VllmConfig) -> int:
    """Tokens of text that the model was made for; 0 where its config does not say."""
    return getattr(vllm_config.model_config.hf_text_config, "max_position_embeddings", None) or 0


def beyond(vllm_config: VllmConfig) -> bool:
    """Whether texts may be longer than what the model was made for."""
    return 0 < context_of(vllm_config) < vllm_config.model_config.max_model_len


def global_attention(model: nn.Module) -> dict[int, str]:
    """Layer index -> name of each attention module of a decoder that sees the whole text."""
    return {
        extract_layer_index(name): name
        for name, module in model.named_modules()
        if type(module) is Attention and module.sliding_window is None and module.attn_type == AttentionType.DECODER
    }


def _replace(
    model: nn.Module, name: str, plan: Plan, place: int, inputs: Inputs, vllm_config: VllmConfig
) -> LinearizedAttention:
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    attention: Any = getattr(parent, child)
    check_attention(attention, type(parent).__name__)
    hidden_size = vllm_config.model_config.hf_text_config.hidden_size
    sizes = Sizes(
        attention.num_heads, attention.num_kv_heads, attention.head_size, attention.head_size_v, hidden_size
    )  # fmt: skip
    mixer, model_config = make_mixer(plan.config, plan.whole, place, plan.shard).float(), vllm_config.model_config
    if sizes != mixer.sizes:
        raise LolcatsError(f"layer {plan.layers[place]} has other sizes than the model's config tells: {sizes}")
    rotary = _find_rotary(parent, sizes, model_config.dtype) if mixer.needs_rotation else None
    watch(parent, rotary, hidden_size, inputs)
    facts = Facts(
        float(attention.impl.scale), getattr(attention.impl, "logits_soft_cap", None) or None, rotary,
        None if rotary is None or not beyond(vllm_config) else reach_of(rotary, context_of(vllm_config)),
    )  # fmt: skip
    new = LinearizedAttention(attention.layer_name, mixer, facts, inputs)
    setattr(parent, child, new)
    return new


def _find_rotary(parent: nn.Module, sizes: Sizes, dtype: torch.dtype) -> nn.Module:
    name, rotary = type(parent).__name__, rotary_of(parent)
    if rotary is None:
        raise LolcatsError(f"{name} has no rotary module, so what q and k were before it is not known to this mixer")
    check_rotary(rotary, name, sizes.head_dim, sizes.kv_heads, dtype)
    return rotary


def check_attention(attention: Any, name: str) -> None:
    """Raise LolcatsError where vLLM's module does what mixers do not see."""
    impl = attention.impl
    facts = {
        "learned sinks": attention.has_sink,
        "biases of positions (ALiBi)": getattr(impl, "alibi_slopes", None) is not None,
        "the keys of another layer": attention.kv_sharing_target_layer_name is not None,
    }
    for fact, there in facts.items():
        if there:
            raise LolcatsError(f"{name} attends with {fact}, which linearized layers do not do in vLLM yet")


def watch(parent: nn.Module, rotary: nn.Module | None, hidden_size: int, inputs: Inputs) -> None:
    """Have `inputs` hold what an attention module, and then its rotary module, are called with."""

    def note_hidden(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.positions = None  # those of an earlier layer, where this one does not rotate
        inputs.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else _hidden(args, hidden_size)

    def note_positions(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.positions = kwargs["positions"] if "positions" in kwargs else args[0]

    parent.register_forward_pre_hook(note_hidden, with_kwargs=True)
    if rotary is not None and rotary not in inputs.watched:  # layers may share it
        inputs.watched.append(rotary)
        rotary.register_forward_pre_hook(note_positions, with_kwargs=True)


def _hidden(args: tuple[Any, ...], hidden_size: int) -> Tensor:
    for x in args:
        if isinstance(x, Tensor) and x.is_floating_point() and x.shape[-1] == hidden_size:
            return x
    raise LolcatsError(f"expected an attention module that is called with hidden states [tokens, {hidden_size}]")


def _allocate(layers: dict[int, LinearizedAttention], plan: Plan, vllm_config: VllmConfig) -> None:
    """Have vLLM allocate pages of states, and nothing for the attention that is gone."""
    context = vllm_config.compilation_config.static_forward_context
    groups = [[layer] for layer in layers.values()] if len(plan.pages) > 1 else [list(layers.values())]
    for layer in layers.values():
        context[layer.layer_name] = layer
    for group, layout in zip(groups, plan.pages, strict=True):
        mixers = [layer.mixer for layer in group]
        # vLLM reads the number of a layer from its name.
        pages = StatePages(f"{group[0].layer_name}.states", mixers, vllm_config.model_config.dtype, layout)
        context[pages.layer_name] = pages
        for number, layer in enumerate(group):
            layer.keep_in(pages, number)
