"""What hybrid attention is told (`HybridSpec`), and the state that it carries from one segment of a text to the next.

The size of the state does not depend on the length of the text.

Legend: B batch, H query heads, KV key/value heads, S state heads (H or KV), F features, D key size, Dv value size,
R ring slots (`HybridSpec.slots`), s sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

S = TypeVar("S")


def map_state(state: S, fn: Callable[[Tensor], Tensor]) -> S:
    """A state, which is a tuple of tensors, of such tuples and of None, with `fn` applied to each of its tensors.

    A tuple with names stays one.
    """
    value: Any = state
    if value is None or isinstance(value, Tensor):
        new: Any = None if value is None else fn(value)
        return new
    parts = [map_state(part, fn) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def state_tensors(state: Any) -> list[Tensor]:
    """Every tensor of a state, in a fixed order."""
    found: list[Tensor] = []
    map_state(state, lambda t: (found.append(t), t)[1])
    return found


class HybridSpec(NamedTuple):
    """Which keys belong to the softmax half, and how their scores are made."""

    window: int = 64
    """0 is pure linear attention; `window >= N` is exact softmax attention."""
    window_kind: str = "sliding"
    """"sliding" (the last `window` keys, the query's own included) or "terraced" (the query's own block of `window`
    keys and the block before it; blocks start at the first token of the text)."""
    sinks: int = 0
    """The first tokens of the text that always belong to the softmax half."""
    scale: float | None = None
    """Of the scores; None is 1 / sqrt(D)."""
    softcap: float | None = None
    """Scores of the softmax half become softcap tanh(score / softcap) (Gemma 2)."""
    fold: int = 1
    """Keys that leave a sliding window wait in the ring until there are so many, and enter the sums of the state
    together; until then they are answered one by one. It changes no output. A terraced window has blocks of its own."""

    def score_scale(self, size: int) -> float:
        """The scale of the scores of queries and keys of `size` numbers."""
        return size**-0.5 if self.scale is None else self.scale

    @property
    def block(self) -> int:
        """E, the number of keys that enter the sums together."""
        return self.fold if self.window_kind == "sliding" else self.window

    @property
    def slots(self) -> int:
        """R, the number of ring slots: for all tokens of the window, and keys that wait, up to one before E."""
        # A terraced window is two blocks when the later one is full; then the earlier leaves it at once.
        return self.window + self.fold - 1 if self.window_kind == "sliding" else 2 * self.window


class LinearState(NamedTuple):
    """Sums over the keys that left the window, but for those that wait for their block (`layout.summed_tokens`).

    With decay they are decayed up to the last key in them, so the keys still in the ring have not decayed them yet.
    """

    kv: Tensor
    """[B, S, F, Dv] fp32: sum of phi_k(k_j) v_j^T."""
    k_sum: Tensor
    """[B, S, F] fp32: sum of phi_k(k_j)."""


class WindowRing(NamedTuple):
    """The last R tokens. The token at position p of its text is in slot p % R, where it replaces the one at p - R.

    So a new token changes one slot, and the state's `length` says which slots are filled (`layout.held_positions`).
    """

    k: Tensor
    """[B, KV, R, D]."""
    v: Tensor
    """[B, KV, R, Dv]."""
    phi_k: Tensor | None
    """[B, H or KV, R, F], or None where the owner recomputes features from `k` (the model's cache does)."""
    log_decay: Tensor | None
    """[B, H, R] fp32, or None without decay."""


class SinkKeys(NamedTuple):
    """The first s tokens of the text. Slot t is filled once the text has more than t tokens."""

    k: Tensor
    """[B, KV, s, D]."""
    v: Tensor
    """[B, KV, s, Dv]."""


class HybridState(NamedTuple):
    """All that later tokens need to know of earlier ones."""

    linear: LinearState
    window: WindowRing
    sinks: SinkKeys | None
    length: Tensor
    """[B] int64: tokens seen in each row, padding not counted."""

    def map(self, fn: Callable[[Tensor], Tensor]) -> HybridState:
        """Apply `fn` to every tensor (all have the batch as dimension 0) and return the new state."""
        return map_state(self, fn)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state, in a fixed order."""
        return state_tensors(self)

    @property
    def nbytes(self) -> int:
        """Size in bytes of all tensors, for the whole batch."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


class HybridOutput(NamedTuple):
    """What `hybrid_attention` returns."""

    out: Tensor
    """[B, H, N, Dv], in the dtype of v; zero at padding."""
    state: HybridState | None
    """The state after the last token, or None unless `return_state=True`."""


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
