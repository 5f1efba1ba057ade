"""What a mixer keeps of earlier tokens, as others see it: they map, count and keep it, and move its rows.

Legend: B batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lolcats.ops.types import map_state, state_tensors


class State(Protocol):
    """What a mixer keeps of earlier tokens: a NamedTuple of tensors (or of such or plain tuples, or None), batch first.

    Only the mixer that made it reads it; others map, count and keep it.
    """

    @property
    def length(self) -> Tensor:
        """[B] int64: tokens that the state stands for in each row, padding not counted."""
        ...


def state_names(state: Any, prefix: str = "") -> list[str]:
    """Names of the tensors of a state, such as "window.k", in the order of `state_tensors`."""
    if state is None or isinstance(state, Tensor):
        return [] if state is None else [prefix]
    fields = getattr(state, "_fields", None) or map(str, range(len(state)))
    parts = zip(fields, state, strict=True)
    return [n for field, part in parts for n in state_names(part, f"{prefix}.{field}" if prefix else field)]


def state_bytes(state: Any) -> int:
    """Bytes of all tensors of a state, for the whole batch."""
    return sum(t.numel() * t.element_size() for t in state_tensors(state))


def take_rows(pool: Any, slots: Tensor) -> Any:
    """The states in the rows `slots` [B] of a pool; for -1, a row without a text, any."""
    return map_state(pool, lambda t: t.index_select(0, slots.clamp_min(0)))


def put_rows(pool: Any, rows: Any, slots: Tensor) -> None:
    """Write the states of some texts over the rows `slots` [B] of a pool, where these are not -1."""
    # Not by a mask, for which the host would have to wait: rows without a text do what one with a text does.
    held = slots >= 0
    source = torch.where(held, torch.arange(len(slots), device=slots.device), held.byte().argmax())
    target = slots.index_select(0, source).clamp_min(0)
    for old, new in zip(state_tensors(pool), state_tensors(rows), strict=True):
        kept = torch.where(held.any(), new.to(old.dtype), old.index_select(0, target)) if len(slots) else new
        old.index_copy_(0, target, kept.index_select(0, source))


class StateSpec(NamedTuple):
    """The tensors of the state of one text in one layer, without the dimension of the batch."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes, which does not depend on the length of the text."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each tensor."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return tuple(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in pairs)

    @classmethod
    def of(cls, state: Any) -> StateSpec:
        """Of a state that there is."""
        tensors = state_tensors(state)
        shapes = tuple(tuple(t.shape[1:]) for t in tensors)
        return cls(tuple(state_names(state)), shapes, tuple(t.dtype for t in tensors))
