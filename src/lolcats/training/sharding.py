"""Loading a model that is sharded from the start: process 0 reads it, and each gets its part, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.config import FinetuneConfig
from lolcats.errors import LolcatsError
from lolcats.models.layers import decoder_layers
from lolcats.models.sharded import check_torch, empty_weights, shard
from lolcats.training.parallel import from_main_process

Loaded = tuple[PreTrainedModel, Any]
"""A model and its tokenizer."""


def shards_weights(config: FinetuneConfig, accelerator: Accelerator) -> bool:
    """Whether a run with these settings has its weights sharded: one process has nothing to share, but may offload.

    Raises:
        LolcatsError: torch is too old, or the weights would be offloaded to where they are.
    """
    if not config.sharding.enabled:
        return False
    check_torch()
    alone = accelerator.num_processes == 1
    if alone and config.sharding.cpu_offload and accelerator.device.type == "cpu":
        raise LolcatsError(
            "finetune.sharding.cpu_offload moves weights from a GPU to the memory of the CPU, and this run has one "
            "process on the CPU; set it to false"
        )
    return not alone or config.sharding.cpu_offload


def load_sharded(load: Callable[[], Loaded], config: FinetuneConfig, accelerator: Accelerator) -> Loaded:
    """A model that `load` reads into the memory of the CPU of process 0, sharded over all processes.

    The machine of process 0 needs memory for one whole model while it is loaded; every other process for its part and
    one layer.

    Raises:
        LolcatsError: what `load` raises, in all processes; or the model cannot be sharded.
    """
    kept: dict[str, Tensor] = {}

    def read() -> Loaded:
        model, tokenizer = load()
        decoder_layers(model)
        kept.update(empty_weights(model))
        return model, tokenizer

    model, tokenizer = from_main_process(accelerator, read)
    ensure_group(accelerator)
    weight_of = kept.pop if accelerator.is_main_process else None
    options: dict[str, bool] = {"trained": config.method == "full", "cpu_offload": config.sharding.cpu_offload}
    shard(model, weight_of, _indexed(accelerator.device), **options)
    return model.eval(), tokenizer


def ensure_group(accelerator: Accelerator) -> None:
    """Make the group of processes that weights are sharded over, where one process runs without."""
    if not dist.is_initialized():
        from torch.distributed import HashStore  # type: ignore[reportPrivateImportUsage]

        backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def _indexed(device: torch.device) -> torch.device:
    """The device by its number, as parameters name it."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
