"""A cache as a whole, with layers of any kind: its bytes, and its tensors without their gradients."""

from __future__ import annotations

from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache

from lolcats.modeling.cache import LinearizedLayer


def detach_cache(cache: Cache) -> None:
    """Cut what a cache holds, of layers of any kind, from the computation that it came from."""
    for layer in cache.layers:
        if isinstance(layer, LinearizedLayer):
            layer.detach()
        else:
            vars(layer).update(tree_map_only(Tensor, Tensor.detach, dict(vars(layer))))


def state_bytes(cache: Cache) -> int:
    """Bytes that the linearized layers of a cache hold, for the whole batch."""
    return sum(layer.nbytes for layer in cache.layers if isinstance(layer, LinearizedLayer))


def cache_bytes(cache: Cache) -> int:
    """Bytes that a cache holds for the whole batch: states of linearized layers, keys and values of the others."""
    total = state_bytes(cache)
    for layer in cache.layers:
        kept = (getattr(layer, "keys", None), getattr(layer, "values", None))
        total += sum(t.numel() * t.element_size() for t in kept if isinstance(t, Tensor))
    return total
