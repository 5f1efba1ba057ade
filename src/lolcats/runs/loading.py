"""The teacher of a run: whole in every process, or sharded over all."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.config import RunConfig
from lolcats.models.quantization import keep_differentiable
from lolcats.models.teacher import load_teacher
from lolcats.training.sharding import load_sharded, shards_weights


def load_model(
    config: RunConfig, dtype: torch.dtype, device: torch.device, accelerator: Accelerator
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher of a run, whole in every process or sharded over all, as its settings say.

    Raises:
        LolcatsError: see `load_teacher` and `load_sharded`.
    """
    if not shards_weights(config.finetune, accelerator):
        return load_teacher(config.model, dtype, device, config.quantization)
    loaded = load_sharded(
        lambda: load_teacher(config.model, dtype, "cpu", config.quantization), config.finetune, accelerator
    )
    keep_differentiable(loaded[0])
    return loaded
