"""Near attention over many tokens at once: blocks of queries, each against the sinks, its kept pairs and its window.

A block sees the pairs that are kept when it begins, gathered, and the keys that are in a window or leave it within the
block; a mask says which query sees which of them. So time and memory are linear in the length of the text.

Keys lie one after the other: the ring of the state in order (w slots, empty ones at the front), then the N new tokens.
So the key that leaves with query i is number i, and the window of query i ends at number w + i.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lolcats.ops.hybrid.layout import take_tokens
from lolcats.ops.near.attend import attend, with_sink_queries
from lolcats.ops.near.selection import EMPTY, Selection, select_pairs, take_pairs
from lolcats.ops.near.types import KeptPairs, NearOutput, NearRing, NearSpec, NearState
from lolcats.ops.types import SinkKeys, accumulation_dtype

BLOCK = 128
"""Queries of a block; the kernels have the same."""


Kernels = Callable[..., Tensor]
"""Computes the outputs of a call: `kernels.launch.kernel_near`."""


class _Marks(NamedTuple):
    """What chooses the kept pairs."""

    score: Tensor | None  # [B, KV, w + N]
    position: Tensor  # [B, w + N], negative in empty slots


class _Keys(NamedTuple):
    """What the queries may see."""

    k: Tensor  # [B, KV, w + N, D]
    v: Tensor  # [B, KV, w + N, Dv]
    score: Tensor | None  # [B, KV, w + N]
    position: Tensor  # [B, w + N], negative in empty slots
    sinks: SinkKeys | None  # [B, KV, s, .]


def block_near(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: NearSpec,
    score: Tensor | None,
    lengths: Tensor | None,
    sink_logits: Tensor | None,
    state: NearState | None,
    return_state: bool,
    kernels: Kernels | None = None,
    stored: tuple[Tensor, Tensor, NearState] | None = None,
    sink_q: Tensor | None = None,
) -> NearOutput:
    """Near attention from a state; arguments as checked by `near_attention`.

    With `kernels`, which have a block of `BLOCK` queries too, the keys are lined up only where a state is asked for.
    Where pairs are stored in another form than attention sees them in, `stored` is k, v and `state` in that form, of
    which the new state is made.
    """
    batch, _, n, _ = q.shape
    count = torch.full((batch,), n, device=q.device) if lengths is None else lengths
    before = empty_near_state(k, v, spec) if state is None and (return_state or not kernels) else state
    marks = _line_up_scores(score, k, v, before, spec)
    chosen = None
    if spec.pairs:
        block = BLOCK if kernels else min(BLOCK, n)
        chosen = select_pairs(_held_scores(k, v, before, spec), _leaving(marks, spec, count, n), block)
        chosen = _within_reach(chosen, state, spec)
    out = kernels(q, k, v, spec, chosen, lengths, sink_logits, state, sink_q) if kernels else None
    if out is None:
        assert before is not None
        keys = _line_up(k, v, marks, before, spec)
        out = _attend_blocks(q, keys, before.kept, chosen, spec, sink_logits, before.length, min(BLOCK, n), sink_q)
        if lengths is not None:
            real = torch.arange(n, device=q.device) < count[:, None]
            out = torch.where(real[:, None, :, None], out, 0.0)
    if not return_state:
        return NearOutput(out, None)
    held_k, held_v, before = stored or (k, v, before)
    assert before is not None
    return NearOutput(out, _final_state(_line_up(held_k, held_v, marks, before, spec), before, chosen, spec, count))


@torch.no_grad()
def kept_until(k: Tensor, v: Tensor, spec: NearSpec, score: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The query from which on each pair is not kept any more, N if there is none: [B, KV, N] int64.

    Key j, which is no sink, is kept at query i exactly for j + w <= i < its number. Arguments as of `near_attention`,
    for whole texts with `spec.pairs` > 0.
    """
    batch, _, n, _ = k.shape
    count = torch.full((batch,), n, device=k.device) if lengths is None else lengths
    marks = _line_up_scores(score, k, v, None, spec)
    chosen = select_pairs(_held_scores(k, v, None, spec), _leaving(marks, spec, count, n), min(BLOCK, n))
    left = chosen.until[:, :, spec.pairs + spec.window :].long()  # what leaves with query i is key i - w
    return nnf.pad(left, (0, n - left.shape[2]), value=n)


def _held_scores(k: Tensor, v: Tensor, state: NearState | None, spec: NearSpec) -> Tensor:
    """Scores [B, KV, P] of the pairs that are kept before the call."""
    if state is None or state.kept is None:
        return torch.full((*k.shape[:2], spec.pairs), EMPTY, dtype=accumulation_dtype(k, v), device=k.device)
    return state.kept.score


def _within_reach(chosen: Selection, state: NearState | None, spec: NearSpec) -> Selection:
    """The selection with pairs seen no longer than `spec.reach` allows."""
    n = chosen.until.shape[-1] - spec.pairs
    if spec.reach is None or (state is None and n <= spec.reach):
        return chosen
    # Of the new candidates, the one that leaves with query i is the token of the call's number i - w.
    last = torch.arange(-spec.window, n - spec.window, device=chosen.until.device) + spec.reach
    last = last.expand(*chosen.until.shape[:-1], -1)
    if state is not None and state.kept is not None:
        held = state.kept.position - state.length[:, None, None] + spec.reach
    else:
        held = torch.full_like(last[..., : spec.pairs], n)
    last = torch.cat([held.to(last.dtype), last], -1)
    return chosen._replace(until=torch.minimum(chosen.until, last.to(chosen.until.dtype)).clamp_min(0))


def _ring_order(state: NearState, spec: NearSpec) -> Tensor:
    """Slots [B, w] of the ring, the oldest first."""
    return (state.length[:, None] + torch.arange(spec.window, device=state.length.device)) % spec.window


def _line_up_scores(score: Tensor | None, k: Tensor, v: Tensor, state: NearState | None, spec: NearSpec) -> _Marks:
    """Scores and positions of the ring of the state, then of the new tokens; without a state the ring is empty."""
    position = torch.arange(-spec.window, k.shape[2], device=k.device)
    if state is None:
        position = position.expand(k.shape[0], -1)
        score = None if score is None else nnf.pad(score.to(accumulation_dtype(k, v)), (spec.window, 0))
        return _Marks(score, position)
    held = state.ring.score
    if held is not None and score is not None:
        score = torch.cat([take_tokens(held, _ring_order(state, spec)), score.to(held.dtype)], 2)
    return _Marks(score, state.length[:, None] + position)


def _line_up(k: Tensor, v: Tensor, marks: _Marks, state: NearState, spec: NearSpec) -> _Keys:
    """The ring of the state before the new tokens, and the sinks."""
    n, slots = k.shape[2], _ring_order(state, spec)
    start = state.length[:, None]
    ring_k, ring_v = (take_tokens(x, slots).to(new.dtype) for x, new in ((state.ring.k, k), (state.ring.v, v)))
    sinks = state.sinks
    if sinks is not None:
        wanted = torch.arange(spec.sinks, device=k.device) - start
        is_new, index = (wanted >= 0) & (wanted < n), wanted.clamp(0, n - 1)
        sinks = SinkKeys(*(
            torch.where(is_new[:, None, :, None], take_tokens(new, index), old.to(new.dtype))
            for new, old in ((k, sinks.k), (v, sinks.v))
        ))  # fmt: skip
    return _Keys(torch.cat([ring_k, k], 2), torch.cat([ring_v, v], 2), *marks, sinks)


def _leaving(keys: _Keys | _Marks, spec: NearSpec, count: Tensor, n: int) -> Tensor:
    """Score [B, KV, N] of the key that leaves with each query; `EMPTY` where it is a sink, or the query is padding."""
    assert keys.score is not None
    real = torch.arange(n, device=count.device) < count[:, None]
    leaves = (keys.position[:, :n] >= spec.sinks) & real
    return torch.where(leaves[:, None], keys.score[:, :, :n], EMPTY)


def _attend_blocks(
    q: Tensor,
    keys: _Keys,
    kept: KeptPairs | None,
    chosen: Selection | None,
    spec: NearSpec,
    sink_logits: Tensor | None,
    start: Tensor,
    block: int,
    sink_q: Tensor | None = None,
) -> Tensor:
    batch, heads, n, size = q.shape
    kv_heads, w = keys.k.shape[1], spec.window
    over = -n % block
    blocks = (n + over) // block
    query = torch.arange(n + over, device=q.device).view(blocks, block)
    seen_k, seen_v = ([_windows(x, over, w + block, block)] for x in (keys.k, keys.v))
    mask = [_window_mask(keys.position, query, chosen, spec, start, kv_heads, 0 if kept is None else spec.pairs)]
    if keys.sinks is not None:
        for parts, x in ((seen_k, keys.sinks.k), (seen_v, keys.sinks.v)):
            parts.append(x[:, :, None].expand(-1, -1, blocks, -1, -1))
        slots = torch.arange(spec.sinks, device=q.device)
        sink_mask = slots <= query[..., None] + start[:, None, None, None]
        mask.append(sink_mask[:, None].expand(-1, kv_heads, -1, -1, -1))
    if kept is not None and chosen is not None:
        before = chosen.before.long()
        for parts, held, x in ((seen_k, kept.k, keys.k), (seen_v, kept.v, keys.v)):
            candidates = torch.cat([held.to(x.dtype), x[:, :, :n]], 2)
            parts.append(take_pairs(candidates, before))
        until = chosen.until.gather(2, before.flatten(2)).view_as(before)
        # An empty slot is the first to go, and may be there for the whole text.
        filled = _filled(kept.score, keys, spec, n).gather(2, before.flatten(2)).view_as(before)
        mask.append((query[..., None] < until[:, :, :, None]) & filled[:, :, :, None])
    q, seen_k = with_sink_queries(q, sink_q, seen_k, None if keys.sinks is None else 1)
    spec = spec._replace(scale=spec.product_scale(size))
    k, v = (torch.cat(parts, 3).transpose(1, 2).flatten(0, 1) for parts in (seen_k, seen_v))
    rows = torch.cat(mask, -1).transpose(1, 2).flatten(0, 1)
    grouped = nnf.pad(q, (0, 0, 0, over)).unflatten(1, (kv_heads, -1)).unflatten(3, (blocks, block))
    grouped = grouped.permute(0, 3, 1, 2, 4, 5).flatten(0, 1)
    logits = None if sink_logits is None else sink_logits.view(kv_heads, -1)
    out = attend(grouped, k, v, rows, spec, logits).unflatten(0, (batch, blocks))
    return out.permute(0, 2, 3, 1, 4, 5).reshape(batch, heads, n + over, -1)[:, :, :n]


def _filled(held: Tensor, keys: _Keys, spec: NearSpec, n: int) -> Tensor:
    """Which candidates [B, KV, P + N] are pairs at all."""
    left = (keys.position[:, :n] >= spec.sinks)[:, None].expand(-1, held.shape[1], -1)
    return torch.cat([held > EMPTY, left], -1)


def _windows(x: Tensor, over: int, size: int, step: int) -> Tensor:
    """x [B, KV, w + N, d] in overlapping pieces: [B, KV, n, size, d]."""
    return nnf.pad(x, (0, 0, 0, over)).unfold(2, size, step).transpose(-1, -2)


def _window_mask(
    position: Tensor, query: Tensor, chosen: Selection | None, spec: NearSpec, start: Tensor, kv_heads: int, pairs: int
) -> Tensor:
    """Which query [n, C] sees which of the w + C keys of its block: [B, KV, n, C, w + C]."""
    blocks, block = query.shape
    over = query.numel() + spec.window - position.shape[1]
    number = (torch.arange(blocks, device=query.device) * block)[:, None] + torch.arange(
        spec.window + block, device=query.device
    )
    place = nnf.pad(position, (0, over), value=-1)[:, number]  # [B, n, w + C]
    ahead = number[:, None] - query[..., None]  # of the key that leaves with the query
    near = (ahead > 0) & (ahead <= spec.window)
    seen = near & (place >= spec.sinks)[:, :, None]
    # A query of padding beyond the end sees its own place, so that no row is empty.
    seen = seen | ((ahead == spec.window) & (place < 0)[:, :, None])
    seen = seen[:, None].expand(-1, kv_heads, -1, -1, -1)
    if chosen is None:
        return seen
    until = nnf.pad(chosen.until[:, :, pairs:], (0, number.numel()))[:, :, number]
    left = (ahead <= 0) & (query[..., None] < until[:, :, :, None])
    return seen | (left & (place >= spec.sinks)[:, None, :, None])


def _final_state(keys: _Keys, state: NearState, chosen: Selection | None, spec: NearSpec, count: Tensor) -> NearState:
    """The state after the last real token of each row."""
    w, length = spec.window, state.length + count
    # The slot of position p holds what has number p - (start - w).
    slot = torch.arange(w, device=count.device)
    number = count[:, None] + (slot - length[:, None]) % w
    score = None if keys.score is None else take_tokens(keys.score, number)
    ring = NearRing(take_tokens(keys.k, number), take_tokens(keys.v, number), score)
    kept = state.kept
    if kept is not None and chosen is not None:
        n = keys.k.shape[2] - w
        k, v = (torch.cat([held.to(x.dtype), x[:, :, :n]], 2) for held, x in ((kept.k, keys.k), (kept.v, keys.v)))
        scores = torch.cat([kept.score, _leaving(keys, spec, count, n)], 2)
        after = chosen.after.long()
        at = after[..., None]
        position = torch.cat([kept.position, keys.position[:, None, :n].expand(*scores.shape[:2], -1)], 2)
        kept = KeptPairs(
            k.gather(2, at.expand(-1, -1, -1, k.shape[-1])),
            v.gather(2, at.expand(-1, -1, -1, v.shape[-1])),
            scores.gather(2, after),
            position.gather(2, after).to(kept.position.dtype),
        )
    return NearState(ring, keys.sinks, kept, length)


def empty_near_state(k: Tensor, v: Tensor, spec: NearSpec) -> NearState:
    """The state of texts before any token, for keys [B, KV, N, D] and values [B, KV, N, Dv]."""
    batch, heads = k.shape[:2]
    dtype = accumulation_dtype(k, v)

    def zeros(count: int, like: Tensor) -> Tensor:
        return like.new_zeros(batch, heads, count, like.shape[-1])

    score = kept = sinks = None
    if spec.pairs:
        score = torch.zeros(batch, heads, spec.window, dtype=dtype, device=k.device)
        marks = torch.full((batch, heads, spec.pairs), EMPTY, dtype=dtype, device=k.device)
        places = torch.zeros(batch, heads, spec.pairs, dtype=torch.int32, device=k.device)
        kept = KeptPairs(zeros(spec.pairs, k), zeros(spec.pairs, v), marks, places)
    if spec.sinks:
        sinks = SinkKeys(zeros(spec.sinks, k), zeros(spec.sinks, v))
    ring = NearRing(zeros(spec.window, k), zeros(spec.window, v), score)
    return NearState(ring, sinks, kept, torch.zeros(batch, dtype=torch.int64, device=k.device))
