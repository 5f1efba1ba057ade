"""Inputs, a scalar truth and comparisons for the tests of hybrid attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lolcats.ops import HybridOutput, HybridSpec, HybridState, WindowRing, hybrid_attention
from lolcats.ops.hybrid.layout import held_positions, in_order
from lolcats.ops.types import map_state

S = TypeVar("S")

CAP = 0.7  # the scores of the tests are about +-1: most are bent, none is flat
CPU_IMPLEMENTATIONS = ("reference", "chunked", "recurrent")


class Case(NamedTuple):
    """The numbers of one comparison."""

    n: int
    window: int = 16
    kind: str = "sliding"
    sinks: int = 0
    decay: bool = False
    feature_heads: str = "query"  # phi_k a query head, or "kv": a key head
    groups: int = 1  # query heads a key head
    kv_heads: int = 2
    batch: int = 2
    size: int = 4  # D
    value_size: int = 3  # Dv
    features: int = 3  # F
    softcap: float | None = None
    learned: bool = False  # learned sinks
    fold: int = 1

    @property
    def spec(self) -> HybridSpec:
        """The case's `HybridSpec`."""
        return HybridSpec(self.window, self.kind, self.sinks, None, self.softcap, self.fold)


class Tensors(NamedTuple):
    """The tensors of one call, in the order of `hybrid_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor
    phi_k: Tensor
    window_factor: Tensor
    log_decay: Tensor | None
    sink_logits: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        """The tensors that exist."""
        return [x for x in self if x is not None]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Tensors:
        """Apply `fn` to every tensor."""
        return self._over_tokens(fn)._replace(**{name: fn(x) for name, x in self.per_head().items()})

    def per_head(self) -> dict[str, Tensor]:
        """The tensors that do not depend on the text, by name."""
        logits = {} if self.sink_logits is None else {"sink_logits": self.sink_logits}
        return {"window_factor": self.window_factor, **logits}

    def tokens(self, begin: int, end: int | None = None) -> Tensors:
        """Tokens begin .. end - 1."""
        return self._over_tokens(lambda x: x[:, :, begin:end])

    def rows(self, begin: int, end: int) -> Tensors:
        """Rows begin .. end - 1 of the batch."""
        return self._over_tokens(lambda x: x[begin:end])

    def to(self, dtype: torch.dtype) -> Tensors:
        """All tensors in `dtype`."""
        return self.map(lambda x: x.detach().to(dtype))

    def padded(self, left: int, right: int) -> Tensors:
        """Garbage tokens on both sides; finite, but large enough to show if anything looks at them."""

        def pad(x: Tensor) -> Tensor:
            sides = [x.new_full((*x.shape[:2], count, *x.shape[3:]), 7.0) for count in (left, right)]
            return torch.cat([sides[0], x, sides[1]], 2)

        return self._over_tokens(pad)

    def _over_tokens(self, fn: Callable[[Tensor], Tensor]) -> Tensors:
        q, k, v, phi_q, phi_k = (fn(x) for x in self[:5])
        log_decay = None if self.log_decay is None else fn(self.log_decay)
        return self._replace(q=q, k=k, v=v, phi_q=phi_q, phi_k=phi_k, log_decay=log_decay)


def make(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensors:
    """Random inputs that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    batch, n, heads = case.batch, case.n, case.kv_heads * case.groups
    key_heads = heads if case.feature_heads == "query" else case.kv_heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    def uniform(*shape: int, factor: float = 1.0) -> Tensor:
        x = torch.rand(*shape, generator=generator, dtype=torch.float64) * factor
        return x.to(dtype).requires_grad_()

    return Tensors(
        q=normal(batch, heads, n, case.size),
        k=normal(batch, case.kv_heads, n, case.size),
        v=normal(batch, case.kv_heads, n, case.value_size),
        phi_q=uniform(batch, heads, n, case.features),
        phi_k=uniform(batch, key_heads, n, case.features),
        window_factor=normal(heads),
        log_decay=uniform(batch, heads, n, factor=-0.3) if case.decay else None,
        sink_logits=normal(heads) if case.learned else None,
    )


def run(tensors: Tensors, case: Case, impl: str, **options: Any) -> HybridOutput:
    """Call `hybrid_attention`."""
    q, k, v, phi_q, phi_k, factor, log_decay, logits = tensors
    extra = {"log_decay": log_decay, "sink_logits": logits, **options}
    return hybrid_attention(q, k, v, (phi_q, phi_k), factor, case.spec, impl=impl, **extra)


def state_of(tensors: Tensors, case: Case, impl: str, **options: Any) -> HybridState:
    """The state after the last token."""
    state = run(tensors, case, impl, return_state=True, **options).state
    assert state is not None
    return state


def gradients(out: Tensor, tensors: Tensors) -> list[Tensor]:
    """Gradients of a fixed random projection of `out`; zeros for what `out` does not depend on."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(99), dtype=out.dtype).to(out.device)
    leaves = tensors.leaves()
    found = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def assert_same(got: Tensor, want: Tensor, what: str = "output", tolerance: float = 1e-11) -> None:
    """Equal up to rounding in float64, relative to 1 + |want|."""
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def assert_same_gradients(got: Tensor, want: Tensor, tensors: Tensors) -> None:
    """Equal gradients with respect to every input."""
    names = [name for name, x in zip(Tensors._fields, tensors, strict=True) if x is not None]
    for name, a, b in zip(names, gradients(got, tensors), gradients(want, tensors), strict=True):
        assert_same(a, b, f"gradient of {name}", 1e-9)


def assert_same_state(got: HybridState, want: HybridState, case: Case) -> None:
    """Equal sums, and equal tokens in every slot that holds one of the window, or one that waits."""
    assert got.length.tolist() == want.length.tolist()
    assert_same(got.linear.kv, want.linear.kv, "kv")
    assert_same(got.linear.k_sum, want.linear.k_sum, "k_sum")
    held = held_positions(got.length, case.spec)[:, None] >= 0
    rings = [in_order(state.window, state.length) for state in (got, want)]
    for name in WindowRing._fields:
        a, b = (getattr(ring, name) for ring in rings)
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            mask = held if a.ndim == 3 else held[..., None]
            assert_same(a.where(mask, 0), b.where(mask, 0), f"window.{name}")
    assert (got.sinks is None) == (want.sinks is None)
    if got.sinks is not None and want.sinks is not None:
        slots = torch.arange(got.sinks.k.shape[2]) < want.length[:, None]
        for a, b in zip(got.sinks, want.sinks, strict=True):
            assert_same(a.where(slots[:, None, :, None], 0), b.where(slots[:, None, :, None], 0), "sinks")


def scalar_truth(tensors: Tensors, case: Case, row: int = 0) -> Tensor:
    """Eq. 6 with sinks (also learned), cap, decay and both windows, number by number: [H, N, Dv] of one batch row."""
    n, heads, size = case.n, case.kv_heads * case.groups, case.size
    q, k, v, phi_q, phi_k, factors = (x.tolist() if x.ndim == 1 else x[row].tolist() for x in tensors[:6])
    decay = None if tensors.log_decay is None else tensors.log_decay[row].tolist()
    learned = None if tensors.sink_logits is None else tensors.sink_logits.tolist()
    out = torch.zeros(heads, n, case.value_size, dtype=torch.float64)
    for h in range(heads):
        kh, fh = h // case.groups, h * len(phi_k) // heads
        gate = 1 / (1 + math.exp(-factors[h]))
        for i in range(n):
            block = i // case.window - 1 if case.kind == "terraced" else 0
            first = max(0, block * case.window if case.kind == "terraced" else i - case.window + 1)
            near = [j for j in range(i + 1) if j >= first or j < case.sinks]
            scores = {j: sum(a * b for a, b in zip(q[h][i], k[kh][j], strict=True)) / math.sqrt(size) for j in near}
            if case.softcap is not None:
                scores = {j: case.softcap * math.tanh(s / case.softcap) for j, s in scores.items()}
            without_value = [] if learned is None else [learned[h]]
            top = max([*scores.values(), *without_value], default=0.0)
            weights = {j: gate * math.exp(s - top) for j, s in scores.items()}
            total = sum(gate * math.exp(s - top) for s in without_value)
            for j in set(range(i + 1)) - set(near):
                between = 0.0 if decay is None else sum(decay[h][j + 1 : i + 1])
                weights[j] = sum(a * b for a, b in zip(phi_q[h][i], phi_k[fh][j], strict=True)) * math.exp(between)
            total += sum(weights.values())
            for d in range(case.value_size):
                out[h, i, d] = sum(w * v[kh][j][d] for j, w in weights.items()) / total
    return out


def rows_apart(pool: S) -> S:
    """The same pool with its rows further apart than they are long, as in the pages of a serving engine."""
    return map_state(pool, lambda t: torch.stack([t, torch.full_like(t, 9)], 1)[:, 0])
