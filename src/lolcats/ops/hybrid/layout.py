"""Which token may see which, and what is left for later: shared by the implementations that see many tokens at once.

The keys that a call works on are its *extended sequence*: the ring of the initial state (R slots), then the N new
tokens, T = R + N. Sinks are kept apart, because every query may see them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lolcats.ops.types import HybridSpec, HybridState, LinearState, SinkKeys, WindowRing, accumulation_dtype

FULL_DECAY = -800.0
"""exp of it is 0 in float64 too. Below it sums of decays lose what is between them, and far below they overflow."""

ROWS_APART = "it needs a pool of contiguous rows"
"""Why a kernel does not take one; see `contiguous_rows`."""


class Inputs(NamedTuple):
    """The tensors of one call, checked; shapes as in `hybrid_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    phi_q: Tensor
    phi_k: Tensor
    window_factor: Tensor
    log_decay: Tensor | None
    attention_mask: Tensor | None
    segment_ids: Tensor | None
    state: HybridState | None
    sink_logits: Tensor | None = None


@dataclass
class Extended:
    """The extended sequence. `b` is B, or 1 where all rows are alike."""

    k: Tensor  # [B, KV, T, D]
    v: Tensor  # [B, KV, T, Dv]
    phi_k: Tensor  # [B, H or KV, T, F]
    log_decay: Tensor | None  # [B, H, T], 0 at padding
    position: Tensor  # [b, T], -1 at padding and empty slots
    segment: Tensor | None  # [b, T]
    sinks: SinkKeys | None  # [B, KV, s, .]; with segments [B, KV, T, s, .], a set for each token
    length: Tensor  # [B] tokens seen, the new ones included
    ring: int  # R slots in front; 0 without an initial state


def token_positions(inputs: Inputs) -> Tensor:
    """Positions [b, N] of the new tokens in their own text; -1 at padding."""
    n, device = inputs.q.shape[2], inputs.q.device
    if inputs.segment_ids is not None:
        index = torch.arange(n, device=device).expand_as(inputs.segment_ids)
        is_start = torch.ones_like(inputs.segment_ids, dtype=torch.bool)
        is_start[:, 1:] = inputs.segment_ids[:, 1:] != inputs.segment_ids[:, :-1]
        position = index - torch.where(is_start, index, 0).cummax(-1).values
        return torch.where(inputs.segment_ids >= 0, position, -1)
    if inputs.attention_mask is None:
        position = torch.arange(n, device=device)[None]
    else:
        mask = inputs.attention_mask.long()
        position = torch.where(mask > 0, mask.cumsum(-1) - 1, -1)
    if inputs.state is not None:
        position = torch.where(position >= 0, position + inputs.state.length[:, None], -1)
    return position


def extend(inputs: Inputs, spec: HybridSpec) -> Extended:
    """Put the ring of the initial state before the new tokens and find the sinks."""
    position = token_positions(inputs)
    state, batch = inputs.state, inputs.q.shape[0]
    k, v, phi_k, log_decay = inputs.k, inputs.v, inputs.phi_k, inputs.log_decay
    if log_decay is not None:
        log_decay = torch.where(position[:, None] >= 0, log_decay.clamp_min(FULL_DECAY), 0.0)
    sinks = find_sinks(inputs, spec, position)
    length = (position >= 0).sum(-1).expand(batch)
    ring = 0
    if state is not None:
        window, held_position = in_order(state.window, state.length), held_positions(state.length, spec)
        assert window.phi_k is not None
        ring = spec.slots
        k, v = torch.cat([window.k.to(k.dtype), k], 2), torch.cat([window.v.to(v.dtype), v], 2)
        phi_k = torch.cat([window.phi_k.to(phi_k.dtype), phi_k], 2)
        if log_decay is not None:
            assert window.log_decay is not None
            held = torch.where(held_position[:, None] >= 0, window.log_decay, 0.0)
            log_decay = torch.cat([held.to(log_decay.dtype), log_decay], 2)
        position = torch.cat([held_position, position.expand(batch, -1)], 1)
        length = length + state.length
    return Extended(k, v, phi_k, log_decay, position, inputs.segment_ids, sinks, length, ring)


def find_sinks(inputs: Inputs, spec: HybridSpec, position: Tensor) -> SinkKeys | None:
    """The sink keys that the new tokens can see: [B, KV, s, .], or [B, KV, N, s, .] with segments."""
    if spec.sinks == 0:
        return None
    slots = torch.arange(spec.sinks, device=position.device)
    if inputs.segment_ids is not None:
        start = torch.arange(position.shape[1], device=position.device) - position
        index = (start[..., None] + slots).clamp(0, position.shape[1] - 1)  # [B, N, s]
        flat = index.flatten(1)
        return SinkKeys(*(take_tokens(x, flat).unflatten(2, index.shape[1:]) for x in (inputs.k, inputs.v)))
    match = position[:, None] == slots[:, None]  # [b, s, N]
    index = match.long().argmax(-1).expand(inputs.q.shape[0], -1)
    found = SinkKeys(*(take_tokens(x, index) for x in (inputs.k, inputs.v)))
    if inputs.state is None:
        return found
    assert inputs.state.sinks is not None
    is_new = match.any(-1)[:, None, :, None]
    return SinkKeys(
        *(torch.where(is_new, new, old.to(new.dtype)) for new, old in zip(found, inputs.state.sinks, strict=True))
    )


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x [B, h, N, d] or [B, h, N] at tokens index [B, m] -> [B, h, m, d] or [B, h, m]."""
    index = index[:, None].expand(-1, x.shape[1], -1)
    return x.gather(2, index) if x.ndim == 3 else x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))


def in_window(query: Tensor, key: Tensor, spec: HybridSpec) -> Tensor:
    """Whether a key position (<= the query position) belongs to the softmax window. Broadcasts."""
    if spec.window == 0:
        return torch.zeros(torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool, device=query.device)
    if spec.window_kind == "sliding":
        return query - key < spec.window
    blocks = query.div(spec.window, rounding_mode="floor") - key.div(spec.window, rounding_mode="floor")
    return blocks <= 1


def pair_masks(query: Tensor, key: Tensor, spec: HybridSpec, same_text: Tensor | None) -> tuple[Tensor, Tensor]:
    """Masks (softmax, linear) of query positions [..., C, 1] against key positions [..., 1, K], sinks excluded."""
    seen = (key >= spec.sinks) & (key <= query)
    if same_text is not None:
        seen = seen & same_text
    near = in_window(query, key, spec)
    return seen & near, seen & ~near


def sink_mask(query: Tensor, sinks: int) -> Tensor:
    """Which sinks a query may see: positions [..., 1] -> bool [..., s]."""
    return torch.arange(sinks, device=query.device) <= query


def summed_tokens(length: Tensor, spec: HybridSpec) -> Tensor:
    """How many tokens of a text of `length` are in the sums of its state: whole blocks of those that left the window.

    It depends on nothing else, so a text has one state, wherever it was cut. Sinks are counted, though never summed.
    """
    if spec.window_kind == "sliding":
        left = length - spec.window
    else:
        left = ((length - 1).div(spec.window, rounding_mode="floor") - 1) * spec.window
    return left.clamp_min(0).div(spec.block, rounding_mode="floor") * spec.block


def tokens_in_sums(ext: Extended, spec: HybridSpec) -> Tensor:
    """Tokens [B, T] that are in the sums after the last one, as far as they are not in those of the initial state."""
    position = ext.position.expand(ext.length.shape[0], -1)
    return (position >= 0) & (position < summed_tokens(ext.length, spec)[:, None])


def final_state(
    inputs: Inputs, ext: Extended, spec: HybridSpec, dtype: torch.dtype, linear: LinearState | None = None
) -> HybridState:
    """The state after the last token of the extended sequence; its sums are `linear` where the caller has them."""
    summed = tokens_in_sums(ext, spec)
    position = ext.position.expand(summed.shape[0], -1)
    if linear is None:
        linear = fold(inputs.state, ext.phi_k, ext.v, ext.log_decay, summed, position >= spec.sinks, dtype)
    # Stable sort by "is kept" brings what stays to the right end, whatever side the padding was on.
    order = ((position >= 0) & ~summed).long().argsort(dim=-1, stable=True)
    order = order[:, max(0, order.shape[1] - spec.slots) :]
    missing = spec.slots - order.shape[1]
    # There the token at position length - R + i has index i.
    index = (torch.arange(spec.slots, device=order.device) - ext.length[:, None]) % max(1, spec.slots)

    def take(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        front = (0, 0, missing, 0) if x.ndim == 4 else (missing, 0)
        return take_tokens(torch.nn.functional.pad(take_tokens(x, order), front), index)

    log_decay = take(ext.log_decay)
    k, v = take(ext.k), take(ext.v)
    assert k is not None and v is not None
    ring = WindowRing(k, v, take(ext.phi_k), None if log_decay is None else log_decay.to(dtype))
    return HybridState(linear, ring, ext.sinks, ext.length)


def slots_in_order(length: Tensor, slots: int) -> Tensor:
    """Slots [B, R] of the tokens at positions length - R .. length - 1, oldest first."""
    return (length[:, None] + torch.arange(slots, device=length.device)) % max(1, slots)


def at_hand(length: Tensor) -> bool:
    """Whether the host may ask for the length: of one text, on a CPU, in eager code."""
    return len(length) == 1 and length.device.type == "cpu" and not torch.compiler.is_compiling()


def in_order(window: WindowRing, length: Tensor) -> WindowRing:
    """The ring with its tokens oldest first, so that the last is at the right end; empty slots are on the left."""
    slots = window.k.shape[2]

    def take(x: Tensor) -> Tensor:
        if at_hand(length):
            return x.roll(-int(length) % max(1, slots), 2)  # a fifth of the time
        rows = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(*x.shape[:2], 1) * slots
        rows = rows + slots_in_order(length, slots)[:, None]
        return x.flatten(0, 2).index_select(0, rows.flatten()).view(x.shape)

    return WindowRing(*(None if x is None else take(x) for x in window))  # type: ignore[arg-type]


def held_positions(length: Tensor, spec: HybridSpec) -> Tensor:
    """Positions [B, R] of the tokens of `in_order`; -1 where there is none, or one that is in the sums."""
    position = length[:, None] + torch.arange(-spec.slots, 0, device=length.device)
    return torch.where(position >= summed_tokens(length, spec)[:, None], position, -1)


def fold(
    state: HybridState | None,
    phi_k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    entering: Tensor,
    counted: Tensor,
    dtype: torch.dtype,
) -> LinearState:
    """Add keys to the linear state.

    Args:
        phi_k: features [B, S, T, F]; v: values [B, KV, T, Dv]; log_decay: [B, H, T] or None.
        entering: [B, T] bool, the keys to be added; a prefix of the real tokens in time.
        counted: [B, T] bool, False for sinks, which leave the window but stay in the softmax half.
    """
    weight = (entering & counted).to(dtype)[:, None]
    decay_all = None
    if log_decay is not None:
        decay = torch.where(entering[:, None], log_decay.to(dtype), 0.0)
        weight = weight * later_decay(decay).exp()
        decay_all = decay.sum(-1).exp()
    phi = phi_k.to(dtype) * weight[..., None]
    groups = phi.shape[1] // v.shape[1]
    kv = torch.einsum("bkgtf,bktd->bkgfd", phi.unflatten(1, (v.shape[1], groups)), v.to(dtype)).flatten(1, 2)
    k_sum = phi.sum(2)
    if state is not None:
        old_kv, old_sum = (t.to(dtype) for t in state.linear)
        if decay_all is not None:
            old_kv, old_sum = old_kv * decay_all[..., None, None], old_sum * decay_all[..., None]
        kv, k_sum = kv + old_kv, k_sum + old_sum
    return LinearState(kv, k_sum)


def later_decay(log_decay: Tensor) -> Tensor:
    """The sum over all tokens after each: [..., T] -> [..., T]."""
    # Not the sum from each on less its own: beside a strong decay a weak one would be lost.
    return torch.nn.functional.pad(log_decay[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)


def empty_state(inputs: Inputs, spec: HybridSpec) -> HybridState:
    """The state before any token."""
    batch, kv_heads, _, size = inputs.k.shape
    dtype, device = accumulation_dtype(inputs.q, inputs.v), inputs.q.device
    decays = inputs.log_decay is not None
    state_heads = inputs.q.shape[1] if decays else inputs.phi_k.shape[1]
    features, value_size = inputs.phi_q.shape[-1], inputs.v.shape[-1]

    def zeros(*shape: int, like: Tensor) -> Tensor:
        return torch.zeros(batch, *shape, dtype=like.dtype, device=device)

    def accumulator(*shape: int) -> Tensor:
        return torch.zeros(batch, *shape, dtype=dtype, device=device)

    ring = WindowRing(
        zeros(kv_heads, spec.slots, size, like=inputs.k),
        zeros(kv_heads, spec.slots, value_size, like=inputs.v),
        zeros(inputs.phi_k.shape[1], spec.slots, features, like=inputs.phi_k),
        accumulator(inputs.q.shape[1], spec.slots) if decays else None,
    )
    sinks = None
    if spec.sinks:
        sinks = SinkKeys(
            zeros(kv_heads, spec.sinks, size, like=inputs.k),
            zeros(kv_heads, spec.sinks, value_size, like=inputs.v),
        )
    linear = LinearState(accumulator(state_heads, features, value_size), accumulator(state_heads, features))
    return HybridState(linear, ring, sinks, torch.zeros(batch, dtype=torch.long, device=device))


def contiguous_rows(x: Tensor) -> bool:
    """Whether each row of a pool's tensor is in one piece; rows may lie apart."""
    return x[:1].is_contiguous()
