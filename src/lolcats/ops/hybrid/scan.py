"""Sums over earlier chunks, with decay and with segments, in time linear in the number of chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats.ops.types import HybridState, LinearState

GROUP = 32
"""Chunks that one product handles: large enough to keep a GPU busy, small against the state itself."""


def carried_states(
    sums: LinearState, log_decay: Tensor | None, segment: Tensor | None, initial: HybridState | None, delay: int
) -> LinearState:
    """The state that each chunk receives: everything up to the end of the chunk `delay` before it.

    Args:
        sums: per chunk, kv [B, KV, nC, g, F, Dv] and k_sum [B, KV, nC, g, F].
        log_decay: [B, KV, nC, G] total over each chunk, or None (then g = G in `sums`).
        segment: [b, nC] segment of the last token of each chunk, or None.
        initial: the state before the first chunk, or None.
        delay: >= 1.
    """
    chunks, kv_heads = sums.kv.shape[2], sums.kv.shape[1]
    first = LinearState(*(torch.zeros_like(x[:, :, 0]) for x in sums))
    if initial is not None:
        first = LinearState(
            *(x.to(s.dtype).unflatten(1, (kv_heads, -1)) for x, s in zip(initial.linear, sums, strict=True))
        )
    used = max(0, chunks - delay)  # the last chunks' sums reach no one
    waiting = LinearState(*(torch.stack([x] * min(delay, chunks), 2) for x in first))
    parts = [waiting]
    if log_decay is None and segment is None:
        parts.append(LinearState(*(x[:, :, :used].cumsum(2) + f[:, :, None] for x, f in zip(sums, first, strict=True))))
    else:
        parts.extend(_decayed(sums, log_decay, segment, first, used))
    return LinearState(*(torch.cat(x, 2) for x in zip(*parts, strict=True)))


def _decayed(
    sums: LinearState, log_decay: Tensor | None, segment: Tensor | None, carry: LinearState, used: int
) -> list[LinearState]:
    """States after each of the first `used` chunks, group by group."""
    results = []
    carry_segment: Tensor | None = None
    for begin in range(0, used, GROUP):
        end = min(begin + GROUP, used)
        decay = None if log_decay is None else log_decay[:, :, begin:end]
        factor, old = _factors(end - begin, sums.k_sum, decay)
        if segment is not None:
            group = segment[:, begin:end]
            factor = factor * (group[:, :, None] == group[:, None, :]).to(factor.dtype)[:, None, None]
            if carry_segment is not None:
                old = old * (group == carry_segment).to(old.dtype)[:, None, None]
            carry_segment = group[:, -1:]
        states = []
        for x, c in zip((s[:, :, begin:end] for s in sums), carry, strict=True):
            flat = x.transpose(2, 3).flatten(4)  # [B, KV, g, chunks, ...]
            new = factor @ flat + old[..., None] * c.flatten(3)[:, :, :, None]
            states.append(new.unflatten(-1, x.shape[4:]).transpose(2, 3))
        results.append(LinearState(*states))
        carry = LinearState(*(s[:, :, -1] for s in states))
    return results


def _factors(count: int, like: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """Decay from chunk to chunk [B, KV, G, count, count] (lower triangular) and from the carry [B, KV, G, count]."""
    causal = torch.ones(count, count, dtype=torch.bool, device=like.device).tril()
    if log_decay is None:
        ones = causal.to(like.dtype)[None, None, None]
        return ones, ones[..., 0]
    total = log_decay.transpose(2, 3).cumsum(-1)  # [B, KV, G, count]
    between = torch.where(causal, total[..., :, None] - total[..., None, :], -torch.inf)
    return between.exp(), total.exp()
