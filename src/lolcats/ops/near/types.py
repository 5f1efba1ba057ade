"""What near attention is told (`NearSpec`), and the state that it carries from one part of a text to the next.

Legend: B texts, KV key/value heads, D key size, Dv value size, w window, P kept pairs, s sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lolcats.ops.types import SinkKeys, map_state, state_tensors


class NearSpec(NamedTuple):
    """Which pairs of key and value a query sees, and how scores are made."""

    window: int = 64
    """w >= 1: the last w keys, the query's own included."""
    sinks: int = 0
    """The first tokens of the text, which are always seen."""
    pairs: int = 0
    """P, for each key head: of the pairs that left the window, the ones of the highest score."""
    scale: float | None = None
    """Of the products q k; None is 1 / sqrt(D)."""
    softcap: float | None = None
    """Products become softcap tanh(product / softcap) (Gemma 2)."""
    reach: int | None = None
    """A kept pair is seen by queries less than so many tokens after it; None: by all."""

    def product_scale(self, size: int) -> float:
        """The scale for queries and keys of `size` numbers."""
        return size**-0.5 if self.scale is None else self.scale


class NearRing(NamedTuple):
    """The last w tokens. The token at position p of its text is in slot p % w, where it replaces the one at p - w."""

    k: Tensor
    """[B, KV, w, D]."""
    v: Tensor
    """[B, KV, w, Dv]."""
    score: Tensor | None
    """[B, KV, w], or None without kept pairs."""


class KeptPairs(NamedTuple):
    """Pairs that left the window, in no order. A slot whose score is minus infinity is empty."""

    k: Tensor
    """[B, KV, P, D]."""
    v: Tensor
    """[B, KV, P, Dv]."""
    score: Tensor
    """[B, KV, P]."""
    position: Tensor
    """[B, KV, P] int32, of each pair in its text."""


class NearState(NamedTuple):
    """All that later tokens need to know of earlier ones."""

    ring: NearRing
    sinks: SinkKeys | None
    kept: KeptPairs | None
    length: Tensor
    """[B] int64: tokens seen of each text."""

    def in_order(self) -> NearState:
        """The state with its kept pairs in the order of their positions."""
        if self.kept is None:
            return self
        order = self.kept.position.argsort(dim=-1, stable=True)
        k, v = (x.gather(2, order[..., None].expand_as(x)) for x in self.kept[:2])
        return self._replace(kept=KeptPairs(k, v, *(x.gather(2, order) for x in self.kept[2:])))

    def map(self, fn: Callable[[Tensor], Tensor]) -> NearState:
        """Apply `fn` to every tensor and return the new state."""
        return map_state(self, fn)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state, in a fixed order."""
        return state_tensors(self)


class NearPart(NamedTuple):
    """Key heads of the same sizes, of a layer whose key heads may differ, and their state."""

    spec: NearSpec
    state: NearState
    heads: tuple[int, ...]
    """Their numbers in the layer, in the order in which the state has them."""


class NearOutput(NamedTuple):
    """What `near_attention` returns."""

    out: Tensor
    """[B, H, N, Dv] in the dtype of v, 0 beyond the end of a text."""
    state: NearState | None
    """After the last token of each text, or None unless it is asked for."""


STEP_BYTES = 2
"""Of the step of a coded row, a float16, behind its codes."""
OCTAVE = 16
"""Parts of a factor of 2 in which `quantize.measure_keys` gives scales: integers, which no change of dtype rounds."""


class Coded(NamedTuple):
    """Pairs as attention sees them, and as the state has them."""

    k: Tensor
    """[B, KV, N, D], rounded, in the dtype that it had; gradients pass through as if it were not."""
    v: Tensor
    keys: Tensor | None
    """[B, KV, N, `PairCodec.key_bytes`] bytes, as `encode` gives them; None where nobody stores them."""
    values: Tensor | None

    def of(self, take: Callable[[Tensor], Tensor]) -> Coded:
        """What `take` takes of each."""
        stored = (None if x is None else take(x) for x in (self.keys, self.values))
        return Coded(take(self.k), take(self.v), *stored)
