"""Gradient checkpointing: decoder layers keep their input alone, and are computed once more on the way back.

The second computation must be the first one again. What surrounds it is still there, because the stage goes backward
inside its own contexts; only a cache has moved on meanwhile, so the layer is shown its own part of it as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from lolcats.modeling.attention import CACHE_ARGUMENTS
from lolcats.modeling.cache import LinearizedLayer


@contextmanager
def recomputing(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, what these layers compute with gradients is computed again on the way back, which must end inside too."""
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = _checkpointed(layer.forward)
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        cache = next((kwargs[name] for name in CACHE_ARGUMENTS if isinstance(kwargs.get(name), Cache)), None)
        if cache is None:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return checkpoint(_Replayed(forward, cache), *args, use_reentrant=False, **kwargs)

    return run


class _Replayed:
    """A layer's forward that finds the cache as it was at its first call whenever it is called again."""

    def __init__(self, forward: Callable[..., Any], cache: Cache) -> None:
        self.forward, self.cache = forward, cache
        self.before = _copied(cache)
        self.done = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.done:
            self.done = True
            return self.forward(*args, **kwargs)
        now, self.cache.layers = self.cache.layers, [_copy(layer) for layer in self.before]
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.cache.layers = now


def _copied(cache: Cache) -> list[Any]:
    """The layers of a cache, with the tensors that they hold now: layers replace tensors and do not write into them."""
    return [_copy(layer) for layer in cache.layers]


def _copy(layer: Any) -> Any:
    twin = copy.copy(layer)
    if isinstance(layer, LinearizedLayer):
        twin.record = copy.copy(layer.record)
    return twin
