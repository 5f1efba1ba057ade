"""Inputs, a scalar truth and comparisons for the tests of the recurrence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lolcats.ops import RecurrenceOutput, RecurrentState, recurrence

FAMILIES = {
    "linear": ("", False),
    "mamba2": ("head", False),
    "gla": ("channel", False),
    "delta": ("", True),
    "gated_delta": ("head", True),
    "kda": ("channel", True),
}
"""Name -> what the decay is per, and whether there is a beta."""
DECAYING = [name for name, (decay, _) in FAMILIES.items() if decay]


class Tensors(NamedTuple):
    """The tensors of one call, each [B, h, N, ...] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Tensors:
        """Apply `fn` to every tensor."""
        return Tensors(*(None if x is None else fn(x) for x in self))  # type: ignore[arg-type]

    def tokens(self, begin: int, end: int | None = None) -> Tensors:
        """Tokens begin .. end - 1."""
        return self.map(lambda x: x[:, :, begin:end])

    def padded(self, left: int, right: int) -> Tensors:
        """Garbage tokens on both sides, NaN at the outer ones."""

        def garbage(x: Tensor, count: int) -> Tensor:
            found = x.new_full((*x.shape[:2], count, *x.shape[3:]), 7.0)
            found[:, :, :1] = torch.nan
            return found

        return self.map(lambda x: torch.cat([garbage(x, left), x, garbage(x, right)], 2))


def make(
    family: str, n: int, *, state_heads: int = 2, dtype: torch.dtype = torch.float64, batch: int = 2, seed: int = 0
) -> Tensors:
    """Random inputs of 4 query and 2 value heads that require gradients; keys of norm 1, q and k positive."""
    generator = torch.Generator().manual_seed(seed)
    decay, has_beta = FAMILIES[family]
    features, value_size = 5, 3

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, dtype=torch.float64)

    k = torch.nn.functional.normalize(uniform(state_heads, n, features), dim=-1)
    shape = (state_heads, n, features) if decay == "channel" else (state_heads, n)
    found = Tensors(
        q=uniform(4, n, features),
        k=k,
        v=uniform(2, n, value_size) * 2 - 1,
        log_decay=uniform(*shape) * -0.3 if decay else None,
        beta=uniform(state_heads, n) if has_beta else None,
    )
    return found.map(lambda x: x.to(dtype).requires_grad_())


def run(tensors: Tensors, impl: str, **options: Any) -> RecurrenceOutput:
    """Call `recurrence`."""
    q, k, v, log_decay, beta = tensors
    return recurrence(q, k, v, log_decay=log_decay, beta=beta, scale=0.7, impl=impl, **options)


def run_with_state(tensors: Tensors, impl: str, **options: Any) -> tuple[Tensor, RecurrentState]:
    """The output and the state after the last token."""
    out, state = run(tensors, impl, return_state=True, **options)
    assert state is not None
    return out, state


def assert_same(got: Tensor, want: Tensor, tolerance: float = 1e-11) -> None:
    """Equal up to rounding, relative to 1 + |want|; nothing is NaN."""
    assert bool(want.isfinite().all())
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def assert_same_state(got: RecurrentState, want: RecurrentState, tolerance: float = 1e-11) -> None:
    """Equal sums and lengths."""
    assert got.length.tolist() == want.length.tolist()
    assert_same(got.kv, want.kv, tolerance)
    assert (got.k_sum is None) == (want.k_sum is None)
    if got.k_sum is not None and want.k_sum is not None:
        assert_same(got.k_sum, want.k_sum, tolerance)


def gradients(results: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of a fixed random projection of the results."""
    generator = torch.Generator().manual_seed(99)
    total = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in results)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, leaves, retain_graph=True))


def scalar_truth(tensors: Tensors, normalised: bool, row: int = 0) -> Tensor:
    """The formula number by number: [4, N, Dv] of one row."""
    q, k, v, log_decay, beta = (None if x is None else x[row].tolist() for x in tensors)
    assert q is not None and k is not None and v is not None
    n, features, size = len(q[0]), len(q[0][0]), len(v[0][0])
    out = torch.zeros(4, n, size, dtype=torch.float64)
    for h in range(4):
        s, kv = h * len(k) // 4, h * len(v) // 4
        state = [[0.0] * size for _ in range(features)]
        z = [0.0] * features
        for i in range(n):
            g = [0.0] * features
            if log_decay is not None:
                g = log_decay[s][i] if isinstance(log_decay[s][i], list) else [log_decay[s][i]] * features
            state = [[math.exp(g[f]) * x for x in state[f]] for f in range(features)]
            value = v[kv][i]
            if beta is not None:
                held = [sum(k[s][i][f] * state[f][d] for f in range(features)) for d in range(size)]
                value = [beta[s][i] * (value[d] - held[d]) for d in range(size)]
            state = [[state[f][d] + k[s][i][f] * value[d] for d in range(size)] for f in range(features)]
            z = [math.exp(g[f]) * z[f] + k[s][i][f] for f in range(features)]
            total = sum(q[h][i][f] * z[f] for f in range(features)) if normalised else 1.0
            for d in range(size):
                out[h, i, d] = 0.7 * sum(q[h][i][f] * state[f][d] for f in range(features)) / total
    return out
