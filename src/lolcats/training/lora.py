"""LoRA: which linear layers get adapters, and what peft is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lolcats.config import FinetuneConfig
from lolcats.errors import LolcatsError
from lolcats.modeling import LinearizedAttention
from lolcats.modeling.hf import is_added

ROUTERS = {"router", "gate", "shared_expert_gate"}
"""Names of modules that choose experts: what they choose must not change by the way."""

MANY = 1 << 23
"""Numbers of adapters that may be of no use, as in tiny models; more are a mistake."""


QUERIES_AND_KEYS = {
    "q_proj", "k_proj", "q_a_proj", "q_b_proj", "query", "key", "query_proj", "key_proj", "q_lin", "k_lin", "q_attn",
    "wq", "wk",
}  # fmt: skip
"""Names that families give to the linear layers which make queries and keys."""
WITH_VALUES = {
    "qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "kv_proj", "kv_a_proj_with_mqa", "kv_b_proj", "in_proj",
}  # fmt: skip
"""Names of those that make values too, so that they cannot be left out for themselves."""


def check_lora(model: PreTrainedModel, config: FinetuneConfig) -> None:
    """See that LoRA layers can be put on the targets, before anything is trained.

    Raises:
        LolcatsError: a name in `config.targets` is no linear layer of the model, there are no targets, or a rank
            larger than any of them could use would take much memory.
    """
    if config.method != "lora":
        return
    targets = lora_targets(model, config.targets)
    if not targets:
        raise LolcatsError(
            f"finetune.targets {config.targets!r}: this model has no linear layers there; name some of "
            f"{sorted({_last(n) for n in lora_targets(model, 'all')})}, or use finetune.method=full"
        )
    sides = [_sides(model.get_submodule(name)) for name in targets]
    largest, numbers = max(map(min, sides)), config.rank * sum(map(sum, sides))
    if config.rank > largest and numbers > MANY:
        raise LolcatsError(
            f"finetune.rank {config.rank} is more than the smaller side of every target, at most {largest}: "
            f"{numbers:,} numbers of adapters for nothing; lower it"
        )


def _sides(layer: nn.Module) -> tuple[int, int]:
    """Both sides of the weight of a linear layer."""
    if isinstance(layer, nn.Linear):  # its weight may be packed
        return layer.in_features, layer.out_features
    rows, columns = layer.get_parameter("weight").shape
    return rows, columns


def add_lora(model: PreTrainedModel, config: FinetuneConfig) -> PeftModel:
    """Put LoRA layers on the targets (see `lora_targets`).

    Raises:
        LolcatsError: a name in `config.targets` is no linear layer of the model.
    """
    lora = lora_config(model, config, lora_targets(model, config.targets))
    adapter = get_peft_model(model, lora)
    assert isinstance(adapter, PeftModel)
    return adapter


def lora_config(model: nn.Module, config: FinetuneConfig, targets: list[str]) -> LoraConfig:
    """What peft needs to put LoRA layers on `targets`, full names of linear layers of `model`."""
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides by the rank: a float is fine
        lora_dropout=config.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
        task_type="CAUSAL_LM",
    )


@contextmanager
def trusting_autocast(adapter: PeftModel | None, device: torch.device) -> Iterator[None]:
    """Inside, under autocast, peft does not cast inputs to float32: autocast would cast them back for the product."""
    if adapter is None or not torch.is_autocast_enabled(device.type):
        yield
    else:
        with disable_input_dtype_casting(adapter):
            yield


@contextmanager
def dropping(adapter: PeftModel | None) -> Iterator[None]:
    """Inside, the dropout of the adapters drops, though the model around them is in evaluation."""
    layers = [m for m in (() if adapter is None else adapter.modules()) if isinstance(m, LoraLayer)]
    drops = [drop for layer in layers for drop in layer.lora_dropout.values()]
    before = [drop.training for drop in drops]
    try:
        for drop in drops:
            drop.train()
        yield
    finally:
        for drop, training in zip(drops, before, strict=True):
            drop.train(training)


def lora_targets(model: PreTrainedModel, targets: str | list[str]) -> list[str]:
    """Full names of the linear layers that `targets` stands for.

    Args:
        targets: "attention" is every linear layer of the family inside linearized attention, "all" every linear layer
            but the output embedding, routers of experts and what the linearization added, "no_qk" all of these but
            the ones that make queries and keys. In a list, a name that occurs inside linearized attention (q_proj) is
            meant there, one that does not (gate_proj) everywhere.

    Raises:
        LolcatsError: a name in the list is no linear layer of the model, or its queries and keys cannot be left out.
    """
    head = model.get_output_embeddings()
    linear = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and m is not head and not is_added(n) and not ROUTERS & set(n.split("."))
    }
    layers = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, LinearizedAttention))
    inside = [n for n in linear if n.startswith(layers)]
    if targets == "attention":
        return inside
    if targets == "all":
        return list(linear)
    if targets == "no_qk":
        _check_names(layers, inside)
        return [n for n in linear if _last(n) not in QUERIES_AND_KEYS]
    own = {_last(n) for n in inside}
    missing = [t for t in targets if t not in {_last(n) for n in linear}]
    if missing:
        known = sorted({_last(n) for n in linear})
        raise LolcatsError(f"finetune.targets {missing} are no linear layers of this model; it has {known}")
    return [n for n in linear if _last(n) in targets and (_last(n) not in own or n in inside)]


def _check_names(layers: tuple[str, ...], inside: list[str]) -> None:
    """See that the linear layers which make queries and keys are known, and make nothing else."""
    names = [{_last(n) for n in inside if n.startswith(layer)} for layer in layers]
    known = set().union(*names)
    if fused := sorted(known & WITH_VALUES):
        raise LolcatsError(f"finetune.targets no_qk: {', '.join(fused)} of this model makes keys and values together; "
                           f"use a list of names, of {sorted(known - {*fused})} and others")  # fmt: skip
    if not all(own & QUERIES_AND_KEYS for own in names) or len(known & QUERIES_AND_KEYS) < 2:
        raise LolcatsError("finetune.targets no_qk: which linear layers of this model make queries and keys is not "
                           f"known; name those to train, of {sorted(known)} and others")  # fmt: skip


def _last(name: str) -> str:
    return name.rpartition(".")[2]
