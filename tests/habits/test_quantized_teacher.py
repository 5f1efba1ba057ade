"""Stage 1 on a teacher whose linear layers hold int8 weights: the feature maps train, the weights are not touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from lolcats import LinearizationConfig, TrainingData, convert, transfer_attention
from lolcats.config import TransferConfig
from lolcats.modeling import linearized_layers
from lolcats.modeling.hf import cast_weights
from lolcats.training import TransferStage
from lolcats.training.batches import make_batch


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [out, in] and a float scale a row [out, 1]."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


class BufferInt8(nn.Module):
    """A linear layer without parameters: weight and scale are buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return nnf.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))  # type: ignore[operator]


class ParameterInt8(nn.Linear):
    """A linear layer whose `weight` is an int8 parameter, as bitsandbytes has it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight, scale = quantize(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, input: Tensor) -> Tensor:
        return nnf.linear(input, self.weight.to(input.dtype) * self.scale.to(input.dtype))  # type: ignore[operator]


KINDS = [
    pytest.param(BufferInt8, id="buffers"),
    pytest.param(ParameterInt8, id="parameters"),
]


def quantized(model: LlamaForCausalLM, kind: Callable[[nn.Linear], nn.Module]) -> LlamaForCausalLM:
    """Replace every linear layer of the decoder, as quantizers do (the output embedding stays)."""
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, kind(child))
    return model


def everything_frozen(model: PreTrainedModel) -> dict[str, Tensor]:
    added = {id(p) for layer in linearized_layers(model) for p in layer.mixer.parameters()}
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().clone() for name, t in named if id(t) not in added}


def validation_loss(model: PreTrainedModel, data: TrainingData, config: TransferConfig) -> float:
    batch = make_batch(data.validation, np.arange(len(data.validation)), "cpu", keep_apart=False)
    return float(TransferStage(model, config).validate(batch)["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["paper", "matched"])
def test_stage_one_trains_and_touches_no_weight(
    teacher: LlamaForCausalLM, training_data: TrainingData, kind: Any, start: Any
) -> None:
    model = quantized(teacher, kind)
    ids = torch.from_numpy(training_data.train.ids[:4]).long()
    convert(model, LinearizationConfig(window=4, sinks=1, start=start), input_ids=ids)
    before = everything_frozen(model)
    assert sum(t.dtype == torch.int8 for t in before.values()) == 3 * 7
    config = TransferConfig(tokens=20 * 4 * 12, batch_size=4, warmup_steps=1, compile=False)
    untrained = validation_loss(model, training_data, config)
    assert transfer_attention(model, training_data, config).final["loss"] < 0.99 * untrained
    after = everything_frozen(model)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_casting_leaves_integers_alone(teacher: LlamaForCausalLM, kind: Any) -> None:
    model = convert(quantized(teacher, kind), LinearizationConfig(window=4))
    before = {n: t for n, t in everything_frozen(model).items() if t.dtype == torch.int8}
    cast_weights(model, torch.bfloat16)
    after = everything_frozen(model)
    assert before and all(torch.equal(t, after[n]) and after[n].dtype == torch.int8 for n, t in before.items())
    assert model.lm_head.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
