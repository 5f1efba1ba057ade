"""Hybrid attention one token at a time, with a state of constant size: what decoding does.

Written apart from the reference on purpose, so that each checks the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lolcats.ops.hybrid.layout import (
    FULL_DECAY,
    Inputs,
    empty_state,
    fold,
    held_positions,
    in_order,
    in_window,
    slots_in_order,
    take_tokens,
    token_positions,
)
from lolcats.ops.hybrid.scores import cap_scores, row_max
from lolcats.ops.types import (
    HybridOutput,
    HybridSpec,
    HybridState,
    LinearState,
    SinkKeys,
    WindowRing,
    accumulation_dtype,
)


def recurrent_attention(inputs: Inputs, spec: HybridSpec, return_state: bool) -> HybridOutput:
    """Hybrid attention by N steps; arguments as checked by `hybrid_attention`."""
    state = inputs.state if inputs.state is not None else empty_state(inputs, spec)
    position = active_all = None
    if inputs.segment_ids is not None:
        position, active_all = token_positions(inputs), inputs.segment_ids >= 0
    elif inputs.attention_mask is not None:
        active_all = inputs.attention_mask
    empty = state.tensors()
    outputs = []
    for i in range(inputs.q.shape[2]):
        q, k, v, phi_q, phi_k = (x[:, :, i : i + 1] for x in inputs[:5])
        log_decay = None if inputs.log_decay is None else inputs.log_decay[:, :, i : i + 1]
        active = None if active_all is None else active_all[:, i]
        if position is not None:  # a new text starts with an empty state
            state = _restart(state, empty, position[:, i] == 0)
        assert state.window.phi_k is not None
        leaving = _leaving_tokens(state.window.phi_k.to(phi_k.dtype), phi_k, state.length, spec)
        out, state = recurrent_step(q, k, v, phi_q, leaving, inputs.window_factor, state, spec, log_decay, active,
                                    inputs.sink_logits, phi_k)  # fmt: skip
        outputs.append(out)
    return HybridOutput(torch.cat(outputs, 2), state if return_state else None)


def _restart(state: HybridState, empty: list[Tensor], starts: Tensor) -> HybridState:
    """`state` with the rows of `starts` [B] taken from the tensors of the empty state."""
    before = iter(empty)
    return state.map(lambda t: torch.where(starts.view(-1, *[1] * (t.ndim - 1)), next(before).to(t.dtype), t))


def leaving_keys(state: HybridState, k: Tensor, spec: HybridSpec, state_indices: Tensor | None = None) -> Tensor:
    """The keys [B, KV, E, D] that can leave the window with the next token, whose features `hybrid_step` needs.

    They are the oldest of the ring, without a window k [B, KV, 1, D] itself; with `state_indices` [B] those of rows of
    a pool.
    """
    ring, length = state.window.k, state.length
    if state_indices is not None:
        rows = state_indices.clamp_min(0)
        ring, length = ring.index_select(0, rows), length.index_select(0, rows)
    return _leaving_tokens(ring, k, length, spec)


def _leaving_tokens(ring: Tensor, new: Tensor, length: Tensor, spec: HybridSpec) -> Tensor:
    """The tokens of the ring that can leave it: a block of a terraced window, one of a sliding one; or the new one."""
    if spec.slots == 0:
        return new
    if spec.window_kind == "sliding":
        return take_tokens(ring, (length % spec.slots)[:, None])
    return take_tokens(ring, slots_in_order(length, spec.slots)[:, : spec.window])


def recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_leaving: Tensor,
    window_factor: Tensor,
    state: HybridState,
    spec: HybridSpec,
    log_decay: Tensor | None = None,
    active: Tensor | None = None,
    sink_logits: Tensor | None = None,
    phi_k: Tensor | None = None,
) -> tuple[Tensor, HybridState]:
    """Attend with one token and return its output and the next state.

    Args:
        q: [B, H, 1, D]; k: [B, KV, 1, D]; v: [B, KV, 1, Dv]; phi_q: [B, H, 1, F].
        phi_leaving: [B, S, E, F], features of `leaving_keys(state, k, spec)`.
        log_decay: [B, H, 1] or None; active: [B], 0 for rows whose token is padding (their state stays).
        sink_logits: [H] or None.
        phi_k: [B, S, 1, F], features of k where the ring holds features.

    Returns:
        out [B, H, 1, Dv] in the dtype of v; the new state.
    """
    dtype = accumulation_dtype(q, v)
    now = state.length[:, None]  # position of the new token, [B, 1]
    window = in_order(state.window, state.length)
    keys, values = torch.cat([window.k.to(k.dtype), k], 2), torch.cat([window.v.to(v.dtype), v], 2)
    position = torch.cat([held_positions(state.length, spec), now], 1)
    decay = None
    if log_decay is not None:
        assert window.log_decay is not None
        log_decay = log_decay.to(window.log_decay.dtype).clamp_min(FULL_DECAY)
        decay = torch.cat([window.log_decay, log_decay], 2)
    near = in_window(now, position, spec) & (position >= 0)
    linear = _fold_leaving(state, phi_leaving, values, decay, near, position, spec, dtype)
    sinks = _place_sink(state.sinks, k, v, now)
    out = _attend(q, phi_q, keys, values, near & (position >= spec.sinks), sinks, now, linear, decay, near,
                  window_factor, sink_logits, spec, dtype)  # fmt: skip
    ring = WindowRing(*(_place(old, new, now) for old, new in zip(state.window, (k, v, phi_k, log_decay), strict=True)))
    new = HybridState(linear, ring, sinks, state.length + 1)
    if active is not None:
        out, new = _only_active(active > 0, out, new, state)
    return out.to(v.dtype), new


def _place(ring: Tensor | None, new: Tensor | None, now: Tensor) -> Any:
    """A ring [B, h, R, ...] with the new token [B, h, 1, ...] in its slot."""
    if ring is None or new is None:
        return None
    if ring.shape[2] == 0:
        return ring
    own = (now % ring.shape[2]).view(-1, *[1] * (new.ndim - 1)).expand(new.shape)
    return ring.scatter(2, own, new.to(ring.dtype))


def _fold_leaving(
    state: HybridState,
    phi_leaving: Tensor,
    values: Tensor,
    decay: Tensor | None,
    near: Tensor,
    position: Tensor,
    spec: HybridSpec,
    dtype: torch.dtype,
) -> LinearState:
    """Fold the candidates that are no longer near into the linear state."""
    count = phi_leaving.shape[2]
    oldest = position[:, :count]
    leaving = ~near[:, :count] & (oldest >= 0)
    decay = None if decay is None else decay[:, :, :count]
    return fold(state, phi_leaving, values[:, :, :count], decay, leaving, oldest >= spec.sinks, dtype)


def _place_sink(sinks: SinkKeys | None, k: Tensor, v: Tensor, now: Tensor) -> SinkKeys | None:
    """Write the new token into its sink slot where it is one of the first s."""
    if sinks is None:
        return None
    here = (torch.arange(sinks.k.shape[2], device=k.device) == now)[:, None, :, None]
    return SinkKeys(torch.where(here, k, sinks.k.to(k.dtype)), torch.where(here, v, sinks.v.to(v.dtype)))


def _attend(
    q: Tensor,
    phi_q: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    sinks: SinkKeys | None,
    now: Tensor,
    linear: LinearState,
    decay: Tensor | None,
    near: Tensor,
    window_factor: Tensor,
    sink_logits: Tensor | None,
    spec: HybridSpec,
    dtype: torch.dtype,
) -> Tensor:
    """Output of one token from the ring (itself included), the sinks and the linear state: [B, H, 1, Dv]."""
    if sinks is not None:
        keys, values = torch.cat([sinks.k, keys], 2), torch.cat([sinks.v, values], 2)
        visible = torch.cat([torch.arange(sinks.k.shape[2], device=q.device) <= now, visible], 1)
    batch, heads, _, size = q.shape
    grouped = q.to(dtype).reshape(batch, keys.shape[1], -1, size)  # [B, KV, G, D]
    scores = cap_scores(grouped @ keys.to(dtype).mT * spec.score_scale(size), spec.softcap)
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    if sink_logits is not None:
        learned = sink_logits.to(dtype).view(keys.shape[1], -1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, learned], -1)
    gate = torch.sigmoid(window_factor.to(dtype)).reshape(keys.shape[1], -1, 1)
    weights = gate * torch.exp(scores - row_max([scores]))
    numerator = (weights[..., : keys.shape[2]] @ values.to(dtype)).reshape(batch, heads, -1)
    denominator = weights.sum(-1).reshape(batch, heads)

    features = phi_q.to(dtype).squeeze(2)
    if decay is not None:  # the linear state is decayed up to the last key that left
        features = features * (decay.to(dtype) * near[:, None]).sum(-1, keepdim=True).exp()
    features = features.unflatten(1, (linear.k_sum.shape[1], -1))  # [B, S, H/S, F]
    numerator = numerator + (features @ linear.kv).flatten(1, 2)
    denominator = denominator + (features @ linear.k_sum[..., None]).flatten(1)
    seen = denominator != 0  # NaN counts as seen: it must not be hidden
    out = numerator / torch.where(seen, denominator, 1.0)[..., None]
    return torch.where(seen[..., None], out, 0.0).unsqueeze(2)


def _only_active(active: Tensor, out: Tensor, new: HybridState, old: HybridState) -> tuple[Tensor, HybridState]:
    """Keep the old state, and give zeros, in rows whose token is padding."""
    before = iter(old.tensors())

    def choose(t: Tensor) -> Tensor:
        row = active.view(-1, *[1] * (t.ndim - 1))
        return torch.where(row, t, next(before).to(t.dtype))

    return torch.where(active[:, None, None, None], out, 0.0), new.map(choose)
