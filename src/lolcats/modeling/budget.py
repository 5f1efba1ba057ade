"""How the layers of `blend`, or their key heads, share the memory of a uniform setting: found from a batch of text.

The teacher reads the text; its loss on labels that it draws itself is followed back to the heads' outputs, and each
layer says what its near half would cost at each size (`lolcats.mixers.near_cost`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.config import LinearizationConfig
from lolcats.errors import LolcatsError
from lolcats.mixers import Sizes
from lolcats.mixers.near_cost import guessing, near_costs
from lolcats.mixers.near_heads import LENGTH_BYTES, head_bytes
from lolcats.modeling.attention import LinearizedAttention, linearized_layers
from lolcats.modeling.handover import AttentionCall
from lolcats.modeling.head import OutputHead
from lolcats.modeling.spread import Size, Taker, spread_bytes
from lolcats.modeling.start import MAX_ROWS, MAX_TOKENS
from lolcats.ops.near import NearSpec

SMALLEST = 16
"""Tokens of the smallest window that is tried, where the uniform setting has enough."""
HEAD_CHUNK = 512
"""Tokens whose logits are in memory at once."""


def find_split(model: PreTrainedModel, config: LinearizationConfig, input_ids: Tensor) -> list[Any]:
    """The entry of `linearization.split` for each linearized layer.

    Args:
        model: the converted model, still with the teacher's weights.
        config: settings of its layers with a budget to share.
        input_ids: [B, N], texts as long as those that matter; the first rows are read one by one.

    Raises:
        LolcatsError: the teacher's attention, or the gradient of its loss, is not finite; the message names the layer.
    """
    layers, values = linearized_layers(model), config.values()
    window, pairs = values["window"], values["kept"]["pairs"]
    rows = input_ids[:MAX_ROWS, :MAX_TOKENS]
    windows = _sizes(rows.shape[1], max(1, min(SMALLEST, window // 4)), window)
    numbers = [0, *_sizes(rows.shape[1], max(1, min(SMALLEST, pairs // 4)), pairs)] if pairs else [0]
    mix, guess = values["kept"]["mix"], None if values["kept"]["score"] == "oracle" else guessing()
    totals: list[Tensor | float] = [0.0] * len(layers)
    for number, row in enumerate(rows):
        for place, (call, gradient) in enumerate(_gradients(model, layers, row[None], number)):
            costs = near_costs(call, gradient, windows, numbers, values["sinks"], mix, guess)
            totals[place] += costs.cpu()
    found = [_by_size(total, windows, numbers) for total in totals if isinstance(total, Tensor)]
    return _share([layer.mixer.sizes for layer in layers], found, config, model.dtype)


def _sizes(most: int, first: int, own: int) -> list[int]:
    """Powers of 2 times `first` and the steps between, up to `most`; and the size of the uniform setting."""
    steps = {first * factor * 2**power // 2 for power in range(most.bit_length()) for factor in (2, 3)}
    return sorted({own} | {size for size in steps if size <= most})


def _by_size(costs: Tensor, windows: Sequence[int], pairs: Sequence[int]) -> list[dict[Size, float]]:
    """Costs [KV, windows, pairs] as size -> cost, for each key head."""
    sizes = [(window, number) for window in windows for number in pairs]
    return [dict(zip(sizes, head.flatten().tolist(), strict=True)) for head in costs]


def _share(
    layers: list[Sizes], costs: list[list[dict[Size, float]]], config: LinearizationConfig, dtype: torch.dtype
) -> list[Any]:
    """The split, from the costs of each layer's key heads."""
    values = config.values()
    uniform = (values["window"], values["kept"]["pairs"])

    def bytes_of(sizes: Sizes, size: Size, heads: int) -> int:
        spec = NearSpec(size[0], values["sinks"], size[1])
        return heads * head_bytes(spec, sizes, dtype, values["bits"]) + LENGTH_BYTES

    total = sum(bytes_of(sizes, uniform, sizes.kv_heads) for sizes in layers)
    if config.model_dump()["budget"] == "layers":
        takers = [
            Taker({size: sum(head[size] for head in heads) for size in heads[0]},
                  lambda size, sizes=sizes: bytes_of(sizes, size, sizes.kv_heads))
            for sizes, heads in zip(layers, costs, strict=True)
        ]  # fmt: skip
        return [list(size) for size in spread_bytes(takers, total)]
    takers = [
        Taker(head, lambda size, sizes=sizes: bytes_of(sizes, size, 1))
        for sizes, heads in zip(layers, costs, strict=True)
        for head in heads
    ]
    found = iter(spread_bytes(takers, total))
    return [[list(next(found)) for _ in range(sizes.kv_heads)] for sizes in layers]


def _gradients(
    model: PreTrainedModel, layers: list[LinearizedAttention], row: Tensor, seed: int
) -> Iterator[tuple[AttentionCall, Tensor]]:
    """Each layer's call, and the gradient [1, H, N, Dv] for its output of the teacher's loss on labels of its own."""
    calls: list[AttentionCall] = []
    outputs: list[Tensor] = []

    def observe(_layer: LinearizedAttention, call: AttentionCall, teacher: Tensor) -> None:
        if not teacher.requires_grad:
            teacher.requires_grad_()
        calls.append(replace(call, q=call.q.detach(), k=call.k.detach(), v=call.v.detach()))
        outputs.append(teacher)

    head = OutputHead(model)
    with _frozen(model), torch.enable_grad():
        for layer in layers:
            layer.observer = observe
        try:
            hidden = head.hidden(input_ids=row.to(model.device), use_cache=False)
        finally:
            for layer in layers:
                layer.observer = None
        gradients = torch.autograd.grad(hidden, outputs, _loss_gradient(head, hidden.detach(), seed))
    for layer, gradient in zip(layers, gradients, strict=True):
        if not bool(gradient.isfinite().all()):
            raise LolcatsError(
                f"the budget is shared by the gradient of the teacher's loss, and that of layer {layer.layer_idx} is "
                "not finite; look whether the teacher's weights are, or take another dtype"
            )
    return zip(calls, gradients, strict=True)


def _loss_gradient(head: OutputHead, hidden: Tensor, seed: int) -> Tensor:
    """Gradient for hidden states [1, N, d_model] of the summed loss of labels that the model draws itself."""
    generator = torch.Generator(hidden.device).manual_seed(seed)
    parts = []
    for part in hidden.split(HEAD_CHUNK, 1):
        leaf = part.clone().requires_grad_()
        log_p = head(leaf)[0].float().log_softmax(-1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)[:, 0]
        parts.append(torch.autograd.grad(nnf.nll_loss(log_p, labels, reduction="sum"), leaf)[0])
    return torch.cat(parts, 1)


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Inside, no parameter asks for a gradient, and nothing is dropped out."""
    trained, was_training = [p for p in model.parameters() if p.requires_grad], model.training
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()
        model.train(was_training)
