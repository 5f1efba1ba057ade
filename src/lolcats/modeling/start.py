"""The start from text: one batch of the teacher sets the parameters of the mixers that ask for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lolcats.errors import LolcatsError
from lolcats.modeling.attention import LinearizedAttention
from lolcats.modeling.handover import AttentionCall

MAX_ROWS, MAX_TOKENS = 4, 2048
"""Texts and tokens of each that are looked at: the computation may be quadratic."""


@torch.no_grad()
def start_from_text(
    model: nn.Module,
    layers: list[LinearizedAttention],
    input_ids: Tensor,
    run: Callable[[Tensor], object] | None = None,
) -> None:
    """Have each layer's mixer set its parameters (`Mixer.start`).

    Args:
        model: the converted model, still with the teacher's weights.
        layers: its linearized layers.
        input_ids: [B, N]; use texts as long as those that matter.
        run: reads the first of them; None is the model itself.

    Raises:
        LolcatsError: the teacher's attention is not finite; the message names the layer.
    """
    for layer in layers:
        layer.observer = _start
    ids = input_ids[:MAX_ROWS, :MAX_TOKENS]
    try:
        if run is not None:
            run(ids)
        else:
            model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        for layer in layers:
            layer.observer = None


def _start(layer: LinearizedAttention, call: AttentionCall, teacher: Tensor) -> None:
    if not bool(teacher.isfinite().all()):
        raise LolcatsError(
            f"the start from text reads the teacher's attention, and that of layer {layer.layer_idx} is not finite; "
            "look whether the teacher's weights are, or take another dtype"
        )
    layer.mixer.start(call, teacher)
