"""Bytes that a plan tells exactly, beside those of real runs of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lolcats
from lolcats.config import RunConfig
from lolcats.planning.disk import hidden_bytes
from lolcats.planning.memory import TRAINED, finetune_memory, trained_numbers, transfer_memory, weight_bytes
from lolcats.planning.shapes import ModelShape, linearized, read_model, shape_of
from lolcats.training import FinetuneStage, TransferStage

LAYERS: list[dict[str, Any]] = [
    {"mixer": "hybrid", "window": 6},
    {"mixer": "hybrid", "window": 6, "layers": [1], "decay": "gate"},
    {"mixer": "blend", "window": 6, "kept": {"pairs": 4}, "far": "none", "bits": 8},
    {"mixer": "blend", "window": 6, "far": "linear"},
]


def settings(folder: Path, layer: dict[str, Any], **stages: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"model": str(folder), "linearization": layer, "data": {"sequence_length": 24}, **stages}
    )


def shape(config: RunConfig) -> ModelShape:
    return shape_of(linearized(read_model(config.model), config), config)


def held(parameters: dict[str, torch.nn.Parameter]) -> int:
    """Bytes of parameters, gradients and what AdamW keeps, after a step of both."""
    optimizer = torch.optim.AdamW(list(parameters.values()))
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    return sum(t.numel() * t.itemsize for p in parameters.values() for t in (p, p.grad) if t is not None) + sum(
        t.numel() * t.itemsize for t in moments
    )


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("stage", [{}, {"targets": "all", "train_feature_maps": True}, {"method": "full"}], ids=str)
def test_parameters_and_optimiser(layer: dict[str, Any], stage: dict[str, Any], model_folder: Path) -> None:
    config = settings(model_folder, layer, finetune=stage)
    told = shape(config)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    weights = sum(p.numel() for p in model.parameters())
    assert told.numbers == weights
    lolcats.convert(model, config.linearization.without_text())
    first = TransferStage(model, config.transfer)
    assert transfer_memory(told, config, 1, "none").trained == held(first.parameters())
    second = FinetuneStage(model, config.finetune)
    trained = second.parameters()
    assert sum(p.numel() for p in trained.values()) == trained_numbers(told, config)
    full = config.finetune.method == "full"
    own = held(trained) - (4 * weights if full else 0)  # the weights themselves are counted with the weights
    assert finetune_memory(told, config, 1, "none").trained == own
    assert weight_bytes(told, "none", width=4.0) == 4 * weights


def test_weights_of_a_block(model_folder: Path) -> None:
    told = shape(settings(model_folder, LAYERS[0]))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    for number, layer in enumerate(model.model.layers):
        own = sum(p.numel() * p.itemsize for p in layer.parameters())
        assert weight_bytes(told, "none", slice(number, number + 1)) == own
    assert TRAINED == 16


def test_hidden_states(model_folder: Path) -> None:
    """The residual stream in front of a layer, of a batch."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    model.model.layers[1].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model(torch.zeros(3, 24, dtype=torch.long))
    config = settings(model_folder, LAYERS[0])
    assert hidden_bytes(config, 3 * 24, shape(config).hidden) == seen[0].numel() * seen[0].itemsize
