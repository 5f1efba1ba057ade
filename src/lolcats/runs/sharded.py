"""Writing the artefact of a run whose weights are sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lolcats.models.quantization import forget_quantization
from lolcats.models.sharded import local_part, own_rows, whole_tensor
from lolcats.runs.artefact import save_adapter, save_artefact, unchanged
from lolcats.runs.state import Run
from lolcats.training.parallel import on_main_process


@contextmanager
def save_sharded(run: Run) -> Iterator[None]:
    """Write the artefact of a run; inside, the model is what was written, but for weights in 4 bits."""
    adapter = None if run.stage is None else run.stage.adapter
    if adapter is not None and not run.config.finetune.merge:
        on_main_process(run.accelerator, lambda: save_adapter(run.folder.adapter, adapter))
    with merged_shards(run.model):
        weights = gather_weights(run.model, run.accelerator, run.dtype)
        with unchanged(run.model, merging=False):
            forget_quantization(run.model)  # what is written is not quantized any more
            artefact = (run.folder.model, run.model, run.tokenizer, run.config, run.results)
            on_main_process(run.accelerator, lambda: save_artefact(*artefact, weights=weights))
        weights.clear()
        run.write_results()
        yield


@contextmanager
def merged_shards(model: nn.Module) -> Iterator[None]:
    """Inside, adapters are merged into the rows that this process has of the weights; undone to the last bit.

    Weights in 4 bits stay as they are, beside their adapters.
    """
    kept: list[tuple[Any, Tensor, Tensor]] = []
    try:
        for layer in _adapted(model):
            weight = layer.get_base_layer().weight
            if weight.is_floating_point():
                part = local_part(weight.detach())
                kept.append((layer, part, part.clone()))
                part.add_(own_rows(_delta(layer), weight).to(part.device))
                layer.merged_adapters.extend(layer.active_adapters)
        yield
    finally:
        for layer, part, before in kept:
            part.copy_(before)
            layer.merged_adapters.clear()


def gather_weights(model: PreTrainedModel, accelerator: Accelerator, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a model without its adapters, in the memory of the CPU of process 0; nothing in the others.

    They are gathered one by one, so no device ever holds more of them than the largest. Weights in 4 bits are written
    out in `dtype`, and adapters that are not merged are added to them.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    found: dict[str, Tensor] = {}
    device = accelerator.device
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, key = name.rpartition(".")
        if ".lora_" in name or "quant_state" in key or not isinstance(tensor, Tensor):
            continue
        whole = whole_tensor(tensor.detach(), device)
        module = model.get_submodule(owner) if owner in dict(model.named_modules()) else None
        if accelerator.is_main_process:
            if not tensor.is_floating_point() and getattr(module, "quant_state", None) is not None:
                whole = _unpacked(cast(Any, module), whole, dtype)
                layer = packed.get(owner.removesuffix(".base_layer"))
                whole = whole if layer is None else whole.add_(_delta(layer))
            found[name.replace(".base_layer.", ".")] = whole.cpu().clone()
    return found


def _adapted(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def _delta(layer: Any) -> Tensor:
    """What the adapters of a layer add to its weight."""
    (name,) = layer.active_adapters
    with torch.no_grad():
        return layer.get_delta_weight(name)


def _unpacked(layer: Any, packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of a layer in 4 bits as ordinary numbers."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, layer.quant_state).to(dtype)
