"""What a recurrence carries from one part of a text to the next, and what it returns.

Legend: B batch, H query heads, KV value heads, S state heads (H or KV), N tokens, F features, Dv value size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lolcats.ops.types import map_state, state_tensors


class RecurrentState(NamedTuple):
    """All that later tokens need to know of earlier ones."""

    kv: Tensor
    """[B, S, F, Dv]: S_i after the last token."""
    k_sum: Tensor | None
    """[B, S, F]: z_i, the same recurrence with values of 1; None unless the output is normalised."""
    length: Tensor
    """[B] int64: tokens seen in each row, padding not counted."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> RecurrentState:
        """Apply `fn` to every tensor (all have the batch as dimension 0) and return the new state."""
        return map_state(self, fn)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state, in a fixed order."""
        return state_tensors(self)

    @property
    def nbytes(self) -> int:
        """Size in bytes of all tensors, for the whole batch."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


class RecurrenceOutput(NamedTuple):
    """What `recurrence` returns."""

    out: Tensor
    """[B, H, N, Dv], in the dtype of v; zero at padding."""
    state: RecurrentState | None
    """The state after the last token, or None unless `return_state=True`."""
