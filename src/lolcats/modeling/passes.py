"""What is found out once in a forward pass and then holds for all its layers.

A family hands the same mask and the same rotary embeddings to each of its layers, so the identity of these objects
tells the pass. Nothing here keeps them alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lolcats.errors import LolcatsError

T = TypeVar("T")
_blind = ContextVar("blind", default=False)


class Remembered(Generic[T]):
    """The last answer about an object, forgotten with the object; answers must not refer to it."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Any], tuple[Any, ...], T] | None = None

    def get(self, about: Any, context: tuple[Any, ...], find: Callable[[], T]) -> T:
        """The answer for `about` in `context`: that of the last call where both are the same, else `find()`."""
        last = self._last
        if last is not None and last[0]() is about and last[1] == context:
            return last[2]
        answer = find()
        self._last = (weakref.ref(about, self._forget), context, answer)
        return answer

    def _forget(self, reference: weakref.ref[Any]) -> None:
        if self._last is not None and self._last[0] is reference:
            self._last = None


@contextmanager
def unseen_values() -> Iterator[None]:
    """Inside, no value is looked at: the caller knows what masks and positions say."""
    token = _blind.set(True)
    try:
        yield
    finally:
        _blind.reset(token)


def looks_at_values() -> bool:
    """Whether values may be looked at: that breaks a graph that is being compiled or recorded."""
    if torch.compiler.is_compiling() or _blind.get():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def version(tensor: Tensor) -> int:
    """A number that changes when the tensor is written to in place (not for tensors of inference mode)."""
    return 0 if tensor.is_inference() else tensor._version


_visited: Any = WeakIdKeyDictionary()


def check_first_visit(rotary: Any, layer: Any, layer_idx: int) -> None:
    """Refuse a model that comes to the same cache layer twice in one pass, which its rotary embeddings tell.

    Raises:
        LolcatsError: this is the second time.
    """
    key = rotary[0] if isinstance(rotary, tuple | list) and rotary else rotary
    if not isinstance(key, Tensor) or torch.compiler.is_compiling():
        return
    layers = _visited.get(key)
    if layers is None:
        layers = _visited[key] = weakref.WeakSet()
    if layer in layers:
        raise LolcatsError(
            f"layer {layer_idx} is run several times in one forward pass, and its state has room for one: a model that "
            "loops over its layers cannot be linearized for generation; leave such layers out with `layers`"
        )
    layers.add(layer)
