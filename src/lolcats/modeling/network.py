"""What a recorded decoding step takes for granted of its model, so that it is not replayed when that has changed.

A recording has the addresses of the weights in it, and the way that Python took through the model's modules.
"""

from __future__ import annotations

import inspect
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode, is_traceable_wrapper_subclass

from lolcats.modeling.attention import SOFTMAX, LinearizedAttention
from lolcats.modeling.inputs import has_many_axes, place_attentions, prepare_inputs

OUR_HOOKS = (prepare_inputs, place_attentions)
IDLE_HOOKS = "transformers.utils.output_capturing"
"""Where hooks come from that do nothing unless hidden states are asked for."""


class Network:
    """The modules and weights of a model as they are now.

    Args:
        model: which is not referred to itself: recordings belong to it.
        layers: its linearized layers.
    """

    def __init__(self, model: nn.Module, layers: list[LinearizedAttention]) -> None:
        below = [module for module in model.modules() if module is not model]
        tables = chain.from_iterable((m._modules, m._parameters, m._buffers) for m in (model, *below))
        self._values: list[dict[str, Any]] = [table for table in tables if table]
        self.weights = [x for table in self._values for x in table.values() if isinstance(x, Tensor)]
        self._addresses = self._read_addresses()
        self._values += [vars(module) for module in below]
        self._values_then = [dict(values) for values in self._values]
        self.hooks: list[dict[int, Any]] = [h for m in below for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks_then = self._count_hooks()
        self.layers = len(layers)
        reaches = (layer.rotary.known_reach for layer in layers if layer.mixer.needs_rotation)
        self._reaches = {reach.tokens for reach in reaches if reach is not None}

    def is_same(self) -> bool:
        """Whether modules, their attributes and hooks, and the places of weights are what they were.

        What is changed inside an attribute (an entry of a dictionary, say) is not seen.
        """
        if self._read_addresses() != self._addresses or self._count_hooks() != self._hooks_then:
            return False
        try:
            return self._values == self._values_then and not _has_any_global_hook()
        except (RuntimeError, ValueError):  # a tensor or array is another one now, and does not compare to one truth
            return False

    def side(self, seen: int) -> int:
        """How many reaches of layers the next token is beyond, after `seen` tokens."""
        return sum(seen + 1 > tokens for tokens in self._reaches)

    def other(self, seen: int) -> int:
        """Another number of tokens on the same side; the same where there is none near it."""
        others = (n for n in (seen // 2, seen + 1000, seen + 1) if n != seen and self.side(n) == self.side(seen))
        return next(others, seen)

    def _read_addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self.weights]

    def _count_hooks(self) -> int:
        return sum(map(len, self.hooks))


def read_network(model: Any, device: torch.device) -> Network | None:
    """The network of a model all of whose steps do the same kernels; None where a recording might lose something."""
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters or has_many_axes(model.base_model):
        return None
    layers = [module for module in model.modules() if isinstance(module, LinearizedAttention)]
    if any(layer.mixer.needs_rotation and not layer.rotary.is_decided for layer in layers):
        return None
    return read_modules(model, device)


def read_modules(model: Any, device: torch.device) -> Network | None:
    """The network of a model whose modules do what their classes say; None where something else depends on them.

    That is where somebody listens or hooks in, the teacher's attention runs, or weights lie elsewhere.
    """
    layers = [module for module in model.modules() if isinstance(module, LinearizedAttention)]
    if any(layer.mode == SOFTMAX or layer.observer is not None or layer.listener is not None for layer in layers):
        return None
    tensors = cast("chain[Tensor]", chain(model.parameters(), model.buffers()))
    if any(tensor.device != device or is_traceable_wrapper_subclass(tensor) for tensor in tensors):
        return None
    network = Network(model, layers)
    hooks = [hook for table in network.hooks for hook in table.values()]
    lost = [h for h in hooks if h not in OUR_HOOKS and getattr(h, "__module__", None) != IDLE_HOOKS]
    patched = any("forward" in vars(module) for module in model.modules() if module is not model)
    return None if lost or patched or _has_any_global_hook() else network


def may_run_otherwise(model: nn.Module, device: str) -> bool:
    """Whether a pass on a device of this type may run other kernels than Python's way through the model would."""
    if torch.is_grad_enabled() or model.training or torch.is_autocast_enabled(device):
        return False
    if _get_current_dispatch_mode() is not None:
        return False
    return device != "cuda" or not torch.cuda.is_current_stream_capturing()
