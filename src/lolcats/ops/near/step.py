"""Near attention at one more token of each text, from a state of constant size: what decoding does."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from lolcats.ops.hybrid.layout import take_tokens
from lolcats.ops.near.attend import attend, with_sink_queries
from lolcats.ops.near.quantize import PairCodec
from lolcats.ops.near.selection import EMPTY
from lolcats.ops.near.types import KeptPairs, NearPart, NearRing, NearSpec, NearState
from lolcats.ops.types import SinkKeys


def near_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: NearState,
    spec: NearSpec,
    *,
    score: Tensor | None = None,
    active: Tensor | None = None,
    sink_logits: Tensor | None = None,
    sink_q: Tensor | None = None,
    state_indices: Tensor | None = None,
    donate: bool = False,
    codec: PairCodec | None = None,
    impl: str = "auto",
) -> tuple[Tensor, NearState]:
    """One token of each text.

    Args:
        q: [B, H, 1, D]; k: [B, KV, 1, D]; v: [B, KV, 1, Dv]; with `codec` also the bytes that it makes of k and v.
        state: of B texts; with `state_indices` a pool of states of more texts.
        spec: as in `near_attention`.
        score: [B, KV, 1], with kept pairs.
        active: [B], 0 for rows whose token is padding: their output is 0, their state stays.
        sink_logits: [H] or None.
        sink_q: [B, H, 1, D] or None, as in `near_attention`.
        state_indices: [B] int32 or int64, the row of the pool that belongs to each text, each at most once. Only these
            rows are read, and they are changed in place. -1 is a row without a text: its output is 0.
        donate: the caller has no more use for `state`, so that its memory may become that of the new one. The kernel
            then works in place; else it works on a copy.
        codec: of the pairs in the state, as in `near_attention`.
        impl: "triton" is the kernel; "auto" is the kernel on a GPU where it can run, in code that keeps no gradients;
            every other name is the step in torch.

    Returns:
        The output [B, H, 1, Dv] and the new state; with `state_indices` the pool itself.

    Raises:
        ValueError: "triton" cannot run the step; the message says why.
    """
    sink_q = sink_q if spec.sinks else None
    part = NearPart(spec, state, tuple(range(k.shape[1])))
    done = near_steps(
        q, k, v, (part,), score=score, active=active, sink_logits=sink_logits, sink_q=sink_q,
        state_indices=state_indices, donate=donate, codec=codec, impl=impl,
    )  # fmt: skip
    if done is not None:
        return done[0], done[1][0]
    if codec is not None and k.dtype != torch.uint8:
        k, v = codec.encode(k, v)
    if state_indices is None:
        return _torch_step(q, k, v, state, spec, score, active, sink_logits, codec, sink_q)
    held = state_indices >= 0
    rows = state.map(lambda t: t.index_select(0, state_indices.clamp_min(0)))
    active = held if active is None else held & (active > 0)
    out, new = _torch_step(q, k, v, rows, spec, score, active, sink_logits, codec, sink_q)
    at = state_indices[held]
    with torch.no_grad():
        for old, changed in zip(state.tensors(), new.tensors(), strict=True):
            old[at] = changed[held].to(old.dtype)
    return out, state


def near_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[NearPart],
    *,
    score: Tensor | None = None,
    active: Tensor | None = None,
    sink_logits: Tensor | None = None,
    sink_q: Tensor | None = None,
    state_indices: Tensor | None = None,
    donate: bool = False,
    codec: PairCodec | None = None,
    impl: str = "auto",
    mapped: bool = False,
) -> tuple[Tensor, list[NearState]] | None:
    """`near_step` of key heads whose sizes differ, by a kernel for all of them; None where it is not to run.

    Args:
        q: [B, H, 1, D]; k and v: [B, KV, 1, .]; with `codec` also the bytes that it makes of k and v.
        parts: the key heads by their sizes, all KV of them.
        score: [B, KV, 1], where there are kept pairs.
        mapped: q and sink_q are as the codec maps them.
        active, sink_logits, sink_q, state_indices, donate, codec, impl: as in `near_step`.

    Returns:
        The output [B, H, 1, Dv] and the new state of each part.

    Raises:
        ValueError: impl is "triton" and the kernel cannot run the step; the message says why.
    """
    reason = step_refusal(q, k, v, parts, state_indices, sink_logits, codec, impl)
    if reason is not None:
        if impl == "triton":
            raise ValueError(f"impl 'triton' cannot run this decoding step: {reason}; use impl 'auto'")
        return None
    from lolcats.ops.near.kernels.decode_launch import decode_step

    if codec is not None and k.dtype != torch.uint8:
        k, v = codec.encode(k, v)
    if state_indices is None:
        copy = torch.Tensor.contiguous if donate else _own_copy
        parts = [part._replace(state=part.state.map(copy)) for part in parts]
    out = decode_step(q, k, v, parts, score, active, sink_logits, state_indices, codec, sink_q, mapped)
    return out, [part.state for part in parts]


def _own_copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def step_refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: Sequence[NearPart],
    state_indices: Tensor | None,
    sink_logits: Tensor | None,
    codec: PairCodec | None,
    impl: str,
) -> str | None:
    """Why `near_steps` does not run its kernel, or None; k and v may not be coded yet."""
    if impl not in ("auto", "triton"):
        return f"impl is {impl!r}"
    if impl == "auto" and (not q.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling()):
        return "it is for a GPU, in code that keeps no gradients"
    if importlib.util.find_spec("triton") is None:
        return "it needs the package triton, which is not installed here"
    # Not at the top: Triton is a requirement neither of this package nor of the code that `lolcats export` writes.
    from lolcats.ops.near.kernels.decode_launch import refuses

    return refuses(q, k, v, parts, state_indices is not None, sink_logits, codec)


def _torch_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: NearState,
    spec: NearSpec,
    score: Tensor | None,
    active: Tensor | None,
    sink_logits: Tensor | None,
    codec: PairCodec | None,
    sink_q: Tensor | None,
) -> tuple[Tensor, NearState]:
    """`near_step` of a batch, which makes a new state."""
    kept = _keep_leaving(state, spec)
    start, w = state.length, spec.window
    slot = torch.arange(w, device=k.device) == (start % w)[:, None]
    ring = NearRing(*(_put(old, new, slot) for old, new in zip(state.ring, (k, v, score), strict=True)))  # type: ignore[arg-type]
    sinks = state.sinks
    if sinks is not None:
        place = torch.arange(spec.sinks, device=k.device) == start[:, None]
        sinks = SinkKeys(*(_put(old, new, place) for old, new in zip(sinks, (k, v), strict=True)))  # type: ignore[arg-type]
    new = NearState(ring, sinks, kept, start + 1)
    out = _see(q, new if codec is None else codec.decode_state(new, q.dtype), spec, sink_logits, sink_q)
    if active is None:
        return out, new
    is_real = active > 0
    out = torch.where(is_real[:, None, None, None], out, 0.0)
    before = iter(state.tensors())
    return out, new.map(lambda t: torch.where(is_real.view(-1, *[1] * (t.ndim - 1)), t, next(before)))


def _keep_leaving(state: NearState, spec: NearSpec) -> KeptPairs | None:
    """The kept pairs after the oldest of the ring has left: it takes the place of the lowest score, if it is better."""
    if state.kept is None or state.ring.score is None:
        return None
    kept, start = state.kept, state.length
    at = (start % spec.window)[:, None]
    leaves = start - spec.window >= spec.sinks
    score = torch.where(leaves[:, None], take_tokens(state.ring.score, at)[..., 0], EMPTY)
    lowest = kept.score.amin(-1, keepdim=True)
    # Of equal ones the latest goes, as in a text that is read at once.
    worst = torch.where(kept.score == lowest, kept.position, -1).argmax(-1)
    lowest, slots = lowest[..., 0], torch.arange(spec.pairs, device=score.device)
    place = (slots == worst[..., None]) & (score > lowest)[..., None]  # [B, KV, P]
    k, v = (
        torch.where(place[..., None], take_tokens(x, at), old)
        for old, x in ((kept.k, state.ring.k), (kept.v, state.ring.v))
    )
    position = torch.where(place, (start - spec.window)[:, None, None].to(kept.position.dtype), kept.position)
    return KeptPairs(k, v, torch.where(place, score[..., None], kept.score), position)


def _put(old: Tensor | None, new: Tensor | None, place: Tensor) -> Tensor | None:
    """old [B, KV, R, ...] with new [B, KV, 1, ...] at place [B, R]."""
    if old is None or new is None:
        return None
    return torch.where(place.view(place.shape[0], 1, -1, *[1] * (old.ndim - 3)), new.to(old.dtype), old)


def _see(
    q: Tensor, state: NearState, spec: NearSpec, sink_logits: Tensor | None, sink_q: Tensor | None
) -> Tensor:  # fmt: skip
    """Attention of the newest token over all that the state holds."""
    ring, kept = state.ring, state.kept
    kv_heads, newest = ring.k.shape[1], state.length - 1
    age = (newest[:, None] - torch.arange(spec.window, device=q.device)) % spec.window
    filled = newest[:, None] - age >= spec.sinks  # a sink is seen as one
    k, v, mask = [ring.k], [ring.v], [filled[:, None].expand(-1, kv_heads, -1)]
    if state.sinks is not None:
        k.append(state.sinks.k)
        v.append(state.sinks.v)
        seen = torch.arange(spec.sinks, device=q.device) <= newest[:, None]
        mask.append(seen[:, None].expand(-1, kv_heads, -1))
    if kept is not None:
        k.append(kept.k)
        v.append(kept.v)
        seen = kept.score > EMPTY
        if spec.reach is not None:
            seen &= newest[:, None, None] - kept.position < spec.reach
        mask.append(seen)
    spec = spec._replace(scale=spec.product_scale(q.shape[-1]))
    q, k = with_sink_queries(q, sink_q, k, None if state.sinks is None else 1)
    grouped = q.unflatten(1, (kv_heads, -1))
    logits = None if sink_logits is None else sink_logits.view(kv_heads, -1)
    joined = torch.cat(k, 2).to(q.dtype), torch.cat(v, 2).to(q.dtype)
    out = attend(grouped, *joined, torch.cat(mask, -1)[:, :, None], spec, logits)
    return out.flatten(1, 2).to(q.dtype)
