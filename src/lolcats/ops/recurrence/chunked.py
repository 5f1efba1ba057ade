"""A recurrence in chunks: products within each chunk, a loop over chunks that carries the state.

Within a chunk that begins with the state S and has tokens 1 .. C, d_ij = exp(g_(j+1) + .. + g_i) and
b_i = exp(g_1 + .. + g_i), both per channel of k where the decay is:

    S_i = Diag(b_i) S + sum over j <= i of Diag(d_ij) k_j u_j^T,    u = v without beta

With beta u_i = beta_i (v_i - k_i^T S') depends on the u_j before it. They solve a triangular system, M_ij = beta_i
k_i^T Diag(d_ij) k_j for j < i (the UT transform, arXiv 2406.06484):

    (I + M) u = beta v - beta (k b) S,    so u = U - W S, where U and W do not depend on S: all chunks at once

Exponents are sums of g, never differences of such sums: none is positive, and what a full decay hides is not lost to
rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lolcats.ops.recurrence.layout import (
    Inputs,
    Spec,
    Sums,
    first_sums,
    in_sums_dtype,
    joined,
    parted,
    quotient,
    with_ones,
)

CHUNK = 64
CHANNEL_CHUNK = 16
"""With a decay per channel there are C exponents for each number of k, so chunks are small."""


class _Chunks(NamedTuple):
    """The tensors of a call in c chunks of C tokens; G = H / S."""

    q: Tensor  # [B, S, c, G, C, F]
    k: Tensor  # [B, S, c, C, F]
    v: Tensor  # [B, S, c, C, Dv], with a column of ones where normalised
    log_decay: Tensor | None  # [B, S, c, C, F or 1]
    beta: Tensor | None  # [B, S, c, C, 1]


class _Decays(NamedTuple):
    """Decays within chunks. They broadcast: f is F or 1, and the leading dimensions are missing without decay."""

    pairs: Tensor  # [B, S, c, C, C, f]: d_ij, 0 for j > i
    from_start: Tensor  # [B, S, c, C, f]: b_i
    to_end: Tensor  # [B, S, c, C, f]: d_Cj
    total: Tensor | None  # [B, S, c, f, 1]: b_C


def chunked_recurrence(inputs: Inputs, spec: Spec, return_state: bool) -> tuple[Tensor, Sums | None]:
    """The recurrence in chunks; arguments as checked by `recurrence`."""
    inputs = in_sums_dtype(inputs)
    first = joined(first_sums(inputs, spec))
    chunks = _cut(inputs, spec)
    decays = _decays(chunks)
    entering, u, last = (_carry if chunks.beta is None else _carry_delta)(chunks, decays, first)
    weights = _scores(chunks.q, chunks.k, decays)  # [B, S, c, G, C, C]
    out = weights @ u[:, :, :, None] + (chunks.q * decays.from_start.unsqueeze(-3)) @ entering[:, :, :, None]
    out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, : inputs.q.shape[2]]
    return quotient(out, spec), parted(last, spec) if return_state else None


def _cut(inputs: Inputs, spec: Spec) -> _Chunks:
    """Chunks of the tokens; the last is filled with zeros, which change no state."""
    n, g, beta = inputs.q.shape[2], inputs.log_decay, inputs.beta
    g = g[..., None] if g is not None and g.ndim == 3 else g
    size = min(n, CHUNK if g is None or g.shape[-1] == 1 else CHANNEL_CHUNK)

    def cut(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, -n % size)).unflatten(2, (-1, size))

    q = cut(inputs.q).unflatten(1, (inputs.k.shape[1], -1)).transpose(2, 3)
    v = with_ones(inputs.v) if spec.normalised else inputs.v
    return _Chunks(
        q, cut(inputs.k), cut(v), None if g is None else cut(g), None if beta is None else cut(beta[..., None])
    )


def _decays(chunks: _Chunks) -> _Decays:
    """The decays within each chunk."""
    size = chunks.k.shape[3]
    causal = torch.ones(size, size, dtype=torch.bool, device=chunks.k.device).tril()[..., None]
    g = chunks.log_decay
    if g is None:
        ones = chunks.k.new_ones(size, 1)
        return _Decays(causal.to(ones.dtype), ones, ones, None)
    # Row l of column j is g_l for l > j, so the sums down the rows are those over j+1 .. i.
    later = torch.where(causal & ~causal.transpose(0, 1), g.unsqueeze(-2), 0.0)
    pairs = later.cumsum(-3).masked_fill(~causal, -torch.inf).exp()
    from_start = g.cumsum(-2).exp()
    return _Decays(pairs, from_start, pairs[..., -1, :, :], from_start[..., -1, :, None])


def _scores(x: Tensor, k: Tensor, decays: _Decays) -> Tensor:
    """x_i^T Diag(d_ij) k_j, 0 for j > i: [B, S, c, G, C, C] of x [B, S, c, G, C, F] and k [B, S, c, C, F]."""
    if decays.pairs.shape[-1] == 1:
        return (x @ k.mT[:, :, :, None]) * decays.pairs[..., 0].unsqueeze(-3)
    decayed = decays.pairs * k.unsqueeze(-3)  # [B, S, c, C, C, F]
    return (x.transpose(3, 4) @ decayed.mT).transpose(3, 4)


def _carry(chunks: _Chunks, decays: _Decays, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The states that enter the chunks [B, S, c, F, Dv], the values u [B, S, c, C, Dv], and the state after the last.

    `state` [B, S, F, Dv] enters the first chunk.
    """
    added = (chunks.k * decays.to_end).mT @ chunks.v
    entering = []
    for c in range(added.shape[2]):
        entering.append(state)
        state = (state if decays.total is None else decays.total[:, :, c] * state) + added[:, :, c]
    return torch.stack(entering, 2), chunks.v, state


def _carry_delta(chunks: _Chunks, decays: _Decays, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_carry` for the delta rule, where the values of a chunk depend on the state that enters it."""
    keys = (chunks.k * decays.to_end).mT  # [B, S, c, F, C]
    u, w = _solve(chunks, decays)
    entering, values = [], []
    for c in range(keys.shape[2]):
        entering.append(state)
        values.append(u[:, :, c] - w[:, :, c] @ state)
        state = (state if decays.total is None else decays.total[:, :, c] * state) + keys[:, :, c] @ values[-1]
    return torch.stack(entering, 2), torch.stack(values, 2), state


def _solve(chunks: _Chunks, decays: _Decays) -> tuple[Tensor, Tensor]:
    """U [B, S, c, C, Dv] and W [B, S, c, C, F]."""
    assert chunks.beta is not None
    k, beta = chunks.k, chunks.beta
    system = beta * _scores(k[:, :, :, None], k, decays).squeeze(3)  # its diagonal is taken as 1
    right = torch.cat([beta * chunks.v, beta * k * decays.from_start], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return solved[..., : -k.shape[-1]], solved[..., -k.shape[-1] :]
