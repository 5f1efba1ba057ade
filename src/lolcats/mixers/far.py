"""The far half of `blend`: linear attention over all keys of a text, with decays.

It is a mean of values, so nothing in it grows with the length of a text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lolcats.mixers.base import Sizes
from lolcats.mixers.decay import Decay
from lolcats.mixers.feature_maps import build_feature_map, map_weights
from lolcats.ops import HybridSpec, HybridState, LinearState, WindowRing, hybrid_attention, resolve_impl
from lolcats.ops.rounding import to_bfloat16
from lolcats.ops.types import map_state

PLAIN = HybridSpec(window=0)
"""`hybrid_attention` without a softmax half is linear attention."""


class FarHalf(nn.Module):
    """A layer over all keys of a text with a state of constant size: what `blend` knows of its far half."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, real: Tensor | None, state: Any, keep: bool
    ) -> tuple[Tensor, Any]:
        """Output [B, H, N, Dv] and, with `keep`, the state after the last real token.

        Args:
            q: [B, H, N, D]; k: [B, KV, N, D]; v: [B, KV, N, Dv]; hidden: [B, N, d_model].
            real: [B, N] bool or None, padding on the right.
            state: of the tokens before, or None.
        """
        raise NotImplementedError

    def sums(self, q: Tensor, k: Tensor, hidden: Tensor) -> Callable[[Tensor], Tensor]:
        """What whole texts give for values [B, KV, N, C]: [B, H, N, C]; the other arguments as for `forward`."""
        return lambda values: self(q, k, values, hidden, None, None, False)[0]

    def recall(self, k: Tensor, v: Tensor, hidden: Tensor, real: Tensor | None, state: Any) -> Tensor:
        """Relative squared error [B, KV, N] with which the state after each token gives its own value for its key."""
        raise NotImplementedError

    def empty_state(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> Any:
        """Before any token; float32, in a model of float64 float64."""
        raise NotImplementedError

    def decays(self, hidden: Tensor) -> Tensor | None:
        """What each token leaves of the state before it, [B, H, N], mean over channels; None where it leaves all."""
        raise NotImplementedError


class HalvedState(FarHalf):
    """A far half whose state is kept in bfloat16 between calls, and computed with in float32.

    Args:
        inner: the far half itself. In a model of float64 its state stays as it is.
    """

    def __init__(self, inner: FarHalf) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, real: Tensor | None, state: Any, keep: bool
    ) -> tuple[Tensor, Any]:
        """See `FarHalf.forward`."""
        out, state = self.inner(q, k, v, hidden, real, _widened(state), keep)
        return out, _narrowed(state)

    def recall(self, k: Tensor, v: Tensor, hidden: Tensor, real: Tensor | None, state: Any) -> Tensor:
        """See `FarHalf.recall`."""
        return self.inner.recall(k, v, hidden, real, _widened(state))

    def empty_state(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> Any:
        """See `FarHalf.empty_state`."""
        return _narrowed(self.inner.empty_state(rows, dtype, device))

    def decays(self, hidden: Tensor) -> Tensor | None:
        """See `FarHalf.decays`."""
        return self.inner.decays(hidden)

    def sums(self, q: Tensor, k: Tensor, hidden: Tensor) -> Callable[[Tensor], Tensor]:
        """See `FarHalf.sums`."""
        return self.inner.sums(q, k, hidden)


def _widened(state: Any) -> Any:
    return map_state(state, lambda t: t.float() if t.dtype == torch.bfloat16 else t)


def _narrowed(state: Any) -> Any:
    return map_state(state, lambda t: to_bfloat16(t) if t.dtype == torch.float32 else t)


class LinearFar(FarHalf):
    """Normalised linear attention: y_i = phi(q_i) S_i / (phi(q_i) z_i), S and z the decayed sums up to token i.

    Args:
        sizes: of what arrives.
        feature_map, feature_size: of queries and keys.
        state_heads: "query" for one state a query head, "kv" for one a key head.
        decay: "none", "fixed" or "gate" (depends on the input).
    """

    def __init__(
        self, sizes: Sizes, feature_map: str, feature_size: int | None, state_heads: str, decay: str, impl: str
    ) -> None:
        super().__init__()
        self.sizes, self.impl = sizes, resolve_impl(impl)
        self.states = sizes.heads if state_heads == "query" else sizes.kv_heads
        # Not "feature_q" and "feature_k": version 0.1 gave these names to tensors that are elsewhere now.
        self.phi_q = build_feature_map(feature_map, sizes.heads, sizes.head_dim, feature_size)
        self.phi_k = build_feature_map(feature_map, self.states, sizes.head_dim, feature_size)
        self.decay = None if decay == "none" else Decay(self.states, sizes.hidden_size, decay == "gate")

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden: Tensor,
        real: Tensor | None,
        state: LinearState | None,
        keep: bool,
    ) -> tuple[Tensor, LinearState | None]:
        """See `FarHalf.forward`."""
        features = map_weights(self.phi_q, self.phi_k, None) or (self.phi_q(q), self.phi_k(k))
        result = hybrid_attention(
            q, k, v, features, torch.zeros(self.sizes.heads, device=q.device), PLAIN,
            log_decay=self._log_decay(hidden), attention_mask=real, impl=self.impl, return_state=keep,
            initial_state=None if state is None else self._for_operation(state, k, v, real),
        )  # fmt: skip
        return result.out, None if result.state is None else self._to_keep(result.state.linear)

    def recall(self, k: Tensor, v: Tensor, hidden: Tensor, real: Tensor | None, state: LinearState | None) -> Tensor:
        """See `FarHalf.recall`."""
        heads, groups = self.sizes.heads, self.sizes.heads // self.sizes.kv_heads
        phi = self.phi_k(k)
        as_queries = phi.repeat_interleave(heads // phi.shape[1], 1)
        result = hybrid_attention(
            k.repeat_interleave(groups, 1), k, v, (as_queries, phi), torch.zeros(heads, device=k.device), PLAIN,
            log_decay=self._log_decay(hidden), attention_mask=real, impl=self.impl,
            initial_state=None if state is None else self._for_operation(state, k, v, real),
        )  # fmt: skip
        wanted = v.repeat_interleave(groups, 1).to(phi.dtype)
        error = (result.out.to(phi.dtype) - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-6)
        return error.unflatten(1, (self.sizes.kv_heads, groups)).mean(2)

    def empty_state(self, rows: int, dtype: torch.dtype, device: torch.device | str) -> LinearState:
        """See `FarHalf.empty_state`."""
        shape = rows, self._kept_heads, self.phi_k.features
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return LinearState(
            torch.zeros(*shape, self.sizes.value_dim, dtype=dtype, device=device),
            torch.zeros(*shape, dtype=dtype, device=device),
        )

    def decays(self, hidden: Tensor) -> Tensor | None:
        """See `FarHalf.decays`."""
        log_decay = self._log_decay(hidden)
        return None if log_decay is None else log_decay.exp()

    def sums(self, q: Tensor, k: Tensor, hidden: Tensor) -> Callable[[Tensor], Tensor]:
        """See `FarHalf.sums`; by the chunked form, for the kernels' values are short."""
        plain = copy.copy(self)
        plain.impl = "chunked"
        return FarHalf.sums(plain, q, k, hidden)

    @property
    def _kept_heads(self) -> int:
        return self.states if self.phi_k.learned or self.decay is not None else self.sizes.kv_heads

    def _log_decay(self, hidden: Tensor) -> Tensor | None:
        """[B, H, N]: the operation wants one for each query head."""
        if self.decay is None:
            return None
        return self.decay(hidden).repeat_interleave(self.sizes.heads // self.states, 1)

    def _for_operation(self, state: LinearState, k: Tensor, v: Tensor, real: Tensor | None) -> HybridState:
        """The state as `hybrid_attention` takes it: with decays one for each query head, and a window of nothing."""
        kv, k_sum = state
        if self.decay is not None:
            repeats = self.sizes.heads // kv.shape[1]
            kv, k_sum = kv.repeat_interleave(repeats, 1), k_sum.repeat_interleave(repeats, 1)
        marks = None if self.decay is None else kv.new_zeros(len(kv), self.sizes.heads, 0)
        phi = kv.new_zeros(len(kv), kv.shape[1], 0, kv.shape[2])
        ring = WindowRing(k[:, :, :0], v[:, :, :0], phi, marks)
        return HybridState(
            LinearState(kv, k_sum), ring, None, torch.zeros(len(kv), dtype=torch.int64, device=kv.device)
        )

    def _to_keep(self, state: LinearState) -> LinearState:
        """One state for each head that has its own."""
        step = state.kv.shape[1] // self._kept_heads
        return LinearState(state.kv[:, ::step].contiguous(), state.k_sum[:, ::step].contiguous())
