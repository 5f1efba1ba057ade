"""What linearized layers give beside what they gave as teacher: the error of each layer's attention output.

The teacher reads the text with softmax attention, the student with its own layers; each layer's input is what its own
model made of the text. Stage 1 compares on the teacher's input alone, which is another error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lolcats.errors import LolcatsError
from lolcats.modeling import linearized_layers
from lolcats.modeling.attention import LinearizedAttention, Listener
from lolcats.training.losses import token_error


@contextmanager
def listening(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Inside, `listener` is told what each linearized layer gives."""
    layers = linearized_layers(model)
    try:
        for layer in layers:
            layer.listener = listener
        yield
    finally:
        for layer in layers:
            layer.listener = None


@contextmanager
def attention_outputs(model: nn.Module, device: str | None = None) -> Iterator[dict[int, Tensor]]:
    """Inside, what each linearized layer gives, [B, H, N, Dv], comes into the dictionary by the index of the layer.

    Args:
        model: with linearized layers.
        device: where the outputs are kept; None is where they are.

    Raises:
        LolcatsError: a layer is run twice in one pass.
    """
    kept: dict[int, Tensor] = {}

    def keep(layer: LinearizedAttention, out: Tensor) -> None:
        if layer.layer_idx in kept:
            raise LolcatsError(
                f"layer {layer.layer_idx} is run several times in one pass, and its output is compared with the "
                "teacher's once; set finetune.error_factor=0 and finetune.lora_dynamics=false"
            )
        kept[layer.layer_idx] = out if device is None else out.to(device)

    with listening(model, keep):
        yield kept


def layer_errors(student: Mapping[int, Tensor], teacher: Mapping[int, Tensor], weights: Tensor) -> Tensor:
    """Mean squared error of each layer [L], in the order of the layers, differentiable in the student's outputs.

    The differences, float32, are made once more on the way back and not kept.

    Args:
        student: outputs by layer, see `attention_outputs`.
        teacher: of the same layers.
        weights: [B, N] float32, of the tokens in the mean.
    """
    return torch.stack(
        [
            torch.as_tensor(
                checkpoint(
                    weighted_error, student[index], teacher[index], weights,
                    use_reentrant=False, preserve_rng_state=False,
                )
            )
            for index in sorted(student)
        ]
    )  # fmt: skip


def weighted_error(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Mean over tokens, with weights [B, N], of the squared error of outputs [B, H, N, Dv]."""
    return (token_error(student, teacher) * weights).sum() / weights.sum().clamp_min(1e-9)
