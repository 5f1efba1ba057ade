"""The decoder layers of a model, whatever its family calls them."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lolcats.errors import LolcatsError


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers of a causal language model.

    Raises:
        LolcatsError: there is no list of as many modules as the model has layers.
    """
    count = number_of_layers(cast(PreTrainedModel, model).config)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise LolcatsError(
            f"{type(model).__name__} cannot be taken apart layer by layer: expected a list of its {count} decoder "
            "layers; leave transfer.blocks.size, finetune.sharding and finetune.gradient_checkpointing off"
        )
    return min(lists, key=lambda found: found[0].count("."))


def number_of_layers(config: PretrainedConfig) -> int:
    """Decoder layers of a model."""
    return int(cast(Any, config.get_text_config(decoder=True)).num_hidden_layers)
