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
    layers = linearized_layers(model)
    search = SplitSearch([layer.mixer.sizes for layer in layers], config, input_ids)
    for number, row in enumerate(search.rows):
        for place, (call, gradient) in enumerate(_gradients(model, layers, row[None], number)):
            search.add(number, place, call, gradient)
    return search.found(model.dtype)


class SplitSearch:
    """What the sizes of linearized layers would cost, added up over rows of text; rows come in order at each layer.

    Args:
        layers: sizes of all linearized layers.
        config, input_ids: as for `find_split`.
    """

    def __init__(self, layers: list[Sizes], config: LinearizationConfig, input_ids: Tensor) -> None:
        self.layers, self.config, self.values = layers, config, config.values()
        self.rows = input_ids[:MAX_ROWS, :MAX_TOKENS]
        """[B, N], those that are read."""
        window, pairs = self.values["window"], self.values["kept"]["pairs"]
        tokens = self.rows.shape[1]
        self.windows = _sizes(tokens, max(1, min(SMALLEST, window // 4)), window)
        self.pairs = [0, *_sizes(tokens, max(1, min(SMALLEST, pairs // 4)), pairs)] if pairs else [0]
        self.totals: list[Tensor | float] = [0.0] * len(layers)
        self._guesses = self._states() if pairs and self.values["kept"]["score"] != "oracle" else {}

    def add(self, row: int, place: int, call: AttentionCall, gradient: Tensor) -> None:
        """Add what one row of text says of the linearized layer number `place`; arguments as for `near_costs`."""
        guess = None
        if self._guesses:
            guess = guessing()
            guess.set_state(self._guesses[row, place])
        values = self.values
        costs = near_costs(call, gradient, self.windows, self.pairs, values["sinks"], values["kept"]["mix"], guess)
        self.totals[place] += costs.cpu()

    def found(self, dtype: torch.dtype) -> list[Any]:
        """The split; `dtype` is that of keys and values."""
        costs = [_by_size(total, self.windows, self.pairs) for total in self.totals if isinstance(total, Tensor)]
        return _share(self.layers, costs, self.config, dtype)

    def _states(self) -> dict[tuple[int, int], Tensor]:
        """Where the generator of guesses is before each row and layer, in whatever order they come."""
        guess, states = guessing(), {}
        for row in range(len(self.rows)):
            for place, sizes in enumerate(self.layers):
                states[row, place] = guess.get_state()
                torch.randn((sizes.kv_heads, self.rows.shape[1]), generator=guess)
        return states


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
    head = OutputHead(model)
    with watched(model, layers) as (calls, outputs):
        hidden = head.hidden(input_ids=row.to(model.device), use_cache=False)
        gradients = torch.autograd.grad(hidden, outputs, label_gradient(head, hidden.detach(), seed))
    check_gradients(layers, gradients)
    return zip(calls, gradients, strict=True)


@contextmanager
def watched(
    model: PreTrainedModel, layers: list[LinearizedAttention]
) -> Iterator[tuple[list[AttentionCall], list[Tensor]]]:
    """Inside, the teacher is run with gradients; calls of the layers and their softmax outputs [1, H, N, Dv]."""
    calls: list[AttentionCall] = []
    outputs: list[Tensor] = []

    def observe(_layer: LinearizedAttention, call: AttentionCall, teacher: Tensor) -> None:
        if not teacher.requires_grad:
            teacher.requires_grad_()
        calls.append(replace(call, q=call.q.detach(), k=call.k.detach(), v=call.v.detach()))
        outputs.append(teacher)

    with _frozen(model), torch.enable_grad():
        for layer in layers:
            layer.observer = observe
        try:
            yield calls, outputs
        finally:
            for layer in layers:
                layer.observer = None


def check_gradients(layers: Sequence[LinearizedAttention], gradients: Sequence[Tensor]) -> None:
    """Raise LolcatsError where the gradient for a layer's output is not finite; the message names it."""
    for layer, gradient in zip(layers, gradients, strict=True):
        if not bool(gradient.isfinite().all()):
            raise LolcatsError(
                f"the budget is shared by the gradient of the teacher's loss, and that of layer {layer.layer_idx} is "
                "not finite; look whether the teacher's weights are, or take another dtype"
            )


def label_gradient(head: OutputHead, hidden: Tensor, seed: int) -> Tensor:
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
