"""`check_family`: whether conversion leaves a model of some family what it was."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.config import LinearizationConfig
from lolcats.modeling.convert import convert


@torch.no_grad()
def check_family(model: PreTrainedModel, input_ids: Tensor) -> float:
    """Largest difference between the logits of a model and of its conversion with a window as long as the text.

    With such a window hybrid attention is softmax attention, so the difference is rounding (about 1e-4 of the logits in
    float32) if lolcats understands what the family's attention does, and large if it does not.

    Args:
        model: any decoder-only model, in float32; it stays as it is (a copy is converted, so memory must hold two).
        input_ids: [B, N] token ids.

    Raises:
        LolcatsError: the model cannot be linearized.
    """
    student = convert(copy.deepcopy(model), LinearizationConfig(window=input_ids.shape[1])).eval()
    was_training = model.training
    teacher = model.eval()
    ids = input_ids.to(model.device)
    difference = student(ids, use_cache=False).logits - teacher(ids, use_cache=False).logits
    model.train(was_training)
    return float(difference.abs().max())
