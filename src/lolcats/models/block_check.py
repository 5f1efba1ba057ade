"""Whether a family can be run block by block: a tiny random model of its class gives the same numbers either way."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.models.block import Block, Part
from lolcats.models.empty import empty_model
from lolcats.models.layers import decoder_layers

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 6, "shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1, "sliding_window": 6,
    "rotary_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""Sizes that change nothing of how the layers of a family hang together."""
CHEAP = 2**23
"""Parameters of the largest model that is made for the check."""
TOKENS = 20
FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a family's code raises when it is called in a way that it is not made for."""


@torch.no_grad()
def check_blocks(config: PretrainedConfig) -> PreTrainedModel:
    """See that every layer of a family follows from the residual stream in front of it alone, bit for bit.

    Args:
        config: of the model that is to be trained block by block.

    Returns:
        The small model.

    Raises:
        LolcatsError: it does not, or no small model can be made of the class.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _small_model(config)
            ids = torch.randint(3, 60, (2, TOKENS))
        packed = torch.cat([torch.arange(TOKENS // 2 - 2), torch.arange(TOKENS // 2 + 2)]).expand(2, -1)
        for position_ids in (None, packed):
            _compare(model, ids, position_ids)
        return model
    except LolcatsError:
        raise
    except FAILURES as error:
        raise _refusal(config, f"a small model of its class ends in {type(error).__name__}: {error}") from error


def _compare(model: PreTrainedModel, ids: Tensor, position_ids: Tensor | None) -> None:
    """Each layer alone against the whole model."""
    streams = _streams(model, ids, position_ids)
    _streams(model, ids.flip(1), position_ids)  # what layers leave for later ones by another way is of this text now
    for index in reversed(range(len(streams))):
        given = None if index == 0 else streams[index - 1]
        # Other tokens behind the first layer: it must be the stream alone that tells them.
        found = _run_layer(model, index, ids if index == 0 else ids.flip(1), position_ids, given)
        if not torch.equal(found, streams[index]):
            raise _refusal(model.config, f"layer {index} does not follow from the hidden states in front of it alone")


def _small_model(config: PretrainedConfig) -> PreTrainedModel:
    """A random model of the class of `config`, with its layers and other sizes."""
    small = copy.deepcopy(config)
    text = cast(Any, small.get_text_config(decoder=True))
    for settings in (config, small):
        if empty_model(settings).num_parameters() <= CHEAP:
            return AutoModelForCausalLM.from_config(settings, dtype=torch.float32, trust_remote_code=False).eval()
        for name, size in SMALL.items():
            if isinstance(getattr(text, name, None), int):
                setattr(text, name, size)
        if isinstance(getattr(text, "qk_rope_head_dim", None), int):  # latent attention has a key a query head
            text.head_dim, text.num_key_value_heads = SMALL["qk_rope_head_dim"], SMALL["num_attention_heads"]
    raise _refusal(config, "no small model of its class can be made to look at")


def _streams(model: PreTrainedModel, ids: Tensor, position_ids: Tensor | None) -> list[Tensor]:
    """What each layer of the whole model gives."""
    outputs: list[Any] = []
    hooks = [
        layer.register_forward_hook(lambda _layer, _args, output: outputs.append(output))
        for layer in decoder_layers(model)[1]
    ]
    try:
        model.base_model(input_ids=ids, position_ids=position_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if any(not isinstance(output, Tensor) for output in outputs):
        raise _refusal(model.config, "its decoder layers return more than hidden states")
    return outputs


def _run_layer(
    model: PreTrainedModel, index: int, ids: Tensor, position_ids: Tensor | None, given: Tensor | None
) -> Tensor:
    """The stream behind one layer as a block of its own."""
    block = Block(model, Part(index, index + 1))
    try:
        return block(ids, position_ids, given)
    finally:
        block.close()


def _refusal(config: PretrainedConfig, why: str) -> LolcatsError:
    return LolcatsError(
        f"{type(config).__name__.removesuffix('Config')} cannot be trained block by block: {why}; set "
        "transfer.blocks.size to null"
    )
