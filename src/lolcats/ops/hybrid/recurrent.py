"""Hybrid attention one token at a time, with a state of constant size: what decoding does.

Written apart from the reference on purpose, so that each checks the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lolcats.ops.hybrid.layout import (
    FULL_DECAY,
    Inputs,
    at_hand,
    empty_state,
    fold,
    held_positions,
    in_order,
    in_window,
    later_decay,
    slots_in_order,
    summed_tokens,
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
    """The keys [B, KV, E, D] that may be neither in the window of the next token nor in the sums before it.

    `hybrid_step` needs their features. They are the oldest of the ring, without a window also k [B, KV, 1, D] itself;
    with `state_indices` [B] those of rows of a pool.
    """
    ring, length = state.window.k, state.length
    if state_indices is not None:
        rows = state_indices.clamp_min(0)
        ring, length = ring.index_select(0, rows), length.index_select(0, rows)
    return _leaving_tokens(ring, k, length, spec)


def _leaving_tokens(ring: Tensor, new: Tensor, length: Tensor, spec: HybridSpec) -> Tensor:
    """The oldest `block` tokens of the ring with the new one behind it."""
    oldest = take_tokens(ring, slots_in_order(length, spec.slots)[:, : spec.block])
    return oldest if oldest.shape[2] == spec.block else torch.cat([oldest.to(new.dtype), new], 2)


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
    held = _behind_the_ring(state, k, v, log_decay, spec)
    linear = _fold_block(state, phi_leaving, held, spec, dtype)
    sinks = _place_sink(state.sinks, k, v, state.length[:, None])
    weights = _softmax_weights(q, held, sinks, window_factor, sink_logits, spec, dtype)
    if spec.window_kind == "sliding" and spec.block > 1:
        waiting, first = _linear_weights(phi_q, phi_leaving, held, spec, dtype), spec.sinks
        waiting = waiting.view(*weights.shape[:3], spec.block)
        weights = weights + nnf.pad(waiting, (first, weights.shape[3] - first - spec.block))
    out = _output(weights, held, sinks, phi_q, linear, dtype)
    new_parts = zip(state.window, (k, v, phi_k, held.new_decay), strict=True)
    ring = WindowRing(*(_place(old, new, state.length[:, None]) for old, new in new_parts))
    new = HybridState(linear, ring, sinks, state.length + 1)
    if active is not None:
        out, new = _only_active(active > 0, out, new, state)
    return out.to(v.dtype), new


class _Held(NamedTuple):
    """The ring in the order of its tokens and behind it the new token, T = R + 1."""

    k: Tensor  # [B, KV, T, D]
    v: Tensor  # [B, KV, T, Dv]
    decay: Tensor | None  # [B, H, T]
    position: Tensor  # [B, T], -1 where the ring holds no token, or one that is in the sums
    near: Tensor  # [B, T], in the window
    summed: Tensor  # [B, 1], tokens that are in the sums after the new one

    @property
    def new_decay(self) -> Tensor | None:
        """Of the new token, [B, H, 1]."""
        return None if self.decay is None else self.decay[:, :, -1:]


def _behind_the_ring(state: HybridState, k: Tensor, v: Tensor, log_decay: Tensor | None, spec: HybridSpec) -> _Held:
    window, now = in_order(state.window, state.length), state.length[:, None]
    keys, values = torch.cat([window.k.to(k.dtype), k], 2), torch.cat([window.v.to(v.dtype), v], 2)
    position = torch.cat([held_positions(state.length, spec), now], 1)
    decay = None
    if log_decay is not None:
        assert window.log_decay is not None
        decay = torch.cat([window.log_decay, log_decay.to(window.log_decay.dtype).clamp_min(FULL_DECAY)], 2)
    near = in_window(now, position, spec) & (position >= 0)
    return _Held(keys, values, decay, position, near, summed_tokens(now + 1, spec))


def _place(ring: Tensor | None, new: Tensor | None, now: Tensor) -> Any:
    """A ring [B, h, R, ...] with the new token [B, h, 1, ...] in its slot."""
    if ring is None or new is None:
        return None
    if ring.shape[2] == 0:
        return ring
    own = (now % ring.shape[2]).view(-1, *[1] * (new.ndim - 1)).expand(new.shape)
    return ring.scatter(2, own, new.to(ring.dtype))


def _fold_block(
    state: HybridState, phi_leaving: Tensor, held: _Held, spec: HybridSpec, dtype: torch.dtype
) -> LinearState:
    """The sums, with a block of keys in texts where it is complete now."""
    count = phi_leaving.shape[2]
    oldest = held.position[:, :count]
    entering = (oldest >= 0) & (oldest < held.summed)
    if at_hand(state.length) and not entering.any():
        return LinearState(*(t.to(dtype) for t in state.linear))
    decay = None if held.decay is None else held.decay[:, :, :count]
    return fold(state, phi_leaving, held.v[:, :, :count], decay, entering, oldest >= spec.sinks, dtype)


def _place_sink(sinks: SinkKeys | None, k: Tensor, v: Tensor, now: Tensor) -> SinkKeys | None:
    """Write the new token into its sink slot where it is one of the first s."""
    if sinks is None:
        return None
    here = (torch.arange(sinks.k.shape[2], device=k.device) == now)[:, None, :, None]
    return SinkKeys(torch.where(here, k, sinks.k.to(k.dtype)), torch.where(here, v, sinks.v.to(v.dtype)))


def _softmax_weights(
    q: Tensor,
    held: _Held,
    sinks: SinkKeys | None,
    window_factor: Tensor,
    sink_logits: Tensor | None,
    spec: HybridSpec,
    dtype: torch.dtype,
) -> Tensor:
    """[B, KV, G, s + T] over sinks and tokens, 0 outside of the window, and a column more of learned sinks."""
    keys, visible = held.k, held.near & (held.position >= spec.sinks)
    if sinks is not None:
        keys = torch.cat([sinks.k, keys], 2)
        filled = torch.arange(spec.sinks, device=q.device) <= held.position[:, -1:]
        visible = torch.cat([filled, visible], 1)
    grouped = q.to(dtype).reshape(q.shape[0], keys.shape[1], -1, q.shape[3])  # [B, KV, G, D]
    scores = cap_scores(grouped @ keys.to(dtype).mT * spec.score_scale(q.shape[3]), spec.softcap)
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    if sink_logits is not None:
        learned = sink_logits.to(dtype).view(keys.shape[1], -1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, learned], -1)
    gate = torch.sigmoid(window_factor.to(dtype)).reshape(keys.shape[1], -1, 1)
    return gate * torch.exp(scores - row_max([scores]))


def _linear_weights(phi_q: Tensor, phi_leaving: Tensor, held: _Held, spec: HybridSpec, dtype: torch.dtype) -> Tensor:
    """[B, H, E] over the oldest tokens, 0 but for those that left the window and wait for their block."""
    count = phi_leaving.shape[2]
    waiting = ~held.near & (held.position >= held.summed) & (held.position >= spec.sinks)
    features = phi_q.to(dtype).squeeze(2).unflatten(1, (phi_leaving.shape[1], -1))  # [B, S, H/S, F]
    weights = (features @ phi_leaving.to(dtype).mT).flatten(1, 2)
    if held.decay is not None:
        weights = weights * later_decay(held.decay)[:, :, :count].to(dtype).exp()
    return torch.where(waiting[:, None, :count], weights, 0.0)


def _output(
    weights: Tensor, held: _Held, sinks: SinkKeys | None, phi_q: Tensor, linear: LinearState, dtype: torch.dtype
) -> Tensor:
    """[B, H, 1, Dv], from the weights of sinks and tokens, and the sums."""
    values = held.v if sinks is None else torch.cat([sinks.v, held.v], 2)
    numerator = (weights[..., : values.shape[2]] @ values.to(dtype)).flatten(1, 2)
    denominator = weights.sum(-1).flatten(1)
    features = phi_q.to(dtype).squeeze(2)
    if held.decay is not None:  # the sums are decayed up to the last key in them
        passed = torch.where((held.position >= held.summed)[:, None], held.decay, 0.0).to(dtype)
        features = features * passed.sum(-1, keepdim=True).exp()
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
        kept = next(before)
        return t if t is kept else torch.where(active.view(-1, *[1] * (t.ndim - 1)), t, kept.to(t.dtype))

    return torch.where(active[:, None, None, None], out, 0.0), new.map(choose)
