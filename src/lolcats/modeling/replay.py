"""Change single layers of a converted model without computing again what comes before them.

The hidden states after each block of the decoder are kept from one pass; in the next one, blocks before the first
layer that changes give what they gave then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.modeling.attention import LinearizedAttention, linearized_layers
from lolcats.modeling.head import giving, probe_ids


class LayerModes:
    """Modes of single layers, and the hidden states from which a pass can start.

    Where a family's blocks hand each other more than hidden states, every pass is a whole one.

    Args:
        model: a converted model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers = {layer.layer_idx: layer for layer in linearized_layers(model)}
        self.blocks = _blocks(model)
        self._kept: dict[str, dict[int, Any]] = {}
        self.replays = bool(self.blocks) and self._may_replay()

    @contextmanager
    def record(self, name: str, modes: Mapping[int, str]) -> Iterator[None]:
        """Inside, layers have these modes, and the hidden states of the last pass are kept under `name`."""
        kept = self._kept.setdefault(name, {})
        with self._set(modes), ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.callback(block.register_forward_hook(_keeper(kept, index)).remove)
            yield

    @contextmanager
    def replay(self, name: str, modes: Mapping[int, str], first: int) -> Iterator[None]:
        """Inside, layers have these modes, which before the layer of index `first` are those of the record `name`."""
        with self._set(modes), ExitStack() as stack:
            if self.replays:
                for index, block in enumerate(self.blocks[: self._block_of(first)]):
                    stack.enter_context(giving(block, self._kept[name][index]))
            yield

    @contextmanager
    def _set(self, modes: Mapping[int, str]) -> Iterator[None]:
        before = {index: layer.mode for index, layer in self.layers.items()}
        try:
            for index, mode in modes.items():
                self.layers[index].mode = mode
            yield
        finally:
            for index, mode in before.items():
                self.layers[index].mode = mode

    def _block_of(self, layer: int) -> int:
        module = self.layers[layer]
        return next(number for number, block in enumerate(self.blocks) if module in set(block.modules()))

    @torch.no_grad()
    def _may_replay(self) -> bool:
        """Whether a pass that starts before the last layer gives what a whole one gives."""
        modes, last = {index: layer.mode for index, layer in self.layers.items()}, max(self.layers)
        try:
            with self.record("probe", modes):
                whole = self.model(input_ids=probe_ids(self.model), use_cache=False).logits
            self.replays = True
            with self.replay("probe", modes, last):
                part = self.model(input_ids=probe_ids(self.model), use_cache=False).logits
        except (RuntimeError, KeyError, AttributeError, TypeError, ValueError, IndexError, LolcatsError):
            return False
        finally:
            self._kept.clear()
        return torch.equal(whole, part)


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks of the decoder: the list of modules that each holds one of the linearized layers; else none."""
    layers = linearized_layers(model)
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            holding = [sum(isinstance(m, LinearizedAttention) for m in block.modules()) for block in module]
            if sum(holding) == len(layers) and max(holding, default=0) == 1:
                return list(module)
    return []


def _keeper(kept: dict[int, Any], index: int) -> Any:
    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        kept[index] = output

    return keep
