"""`hybrid_step`: one token of each text, by the kernel, which works in place, or in torch, which makes a new state."""

from __future__ import annotations

import os
from typing import cast

import torch
from torch import Tensor

from lolcats.ops.devices import without_autocast
from lolcats.ops.hybrid.api import kernels_available, resolve_impl
from lolcats.ops.hybrid.checks import check_step
from lolcats.ops.hybrid.layout import ROWS_APART, contiguous_rows
from lolcats.ops.hybrid.recurrent import leaving_keys, recurrent_step
from lolcats.ops.maps import MapWeights
from lolcats.ops.types import HybridSpec, HybridState


def hybrid_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: tuple[Tensor, Tensor] | MapWeights,
    window_factor: Tensor,
    state: HybridState,
    spec: HybridSpec,
    *,
    log_decay: Tensor | None = None,
    sink_logits: Tensor | None = None,
    active: Tensor | None = None,
    state_indices: Tensor | None = None,
    donate: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, HybridState]:
    """`hybrid_attention` at one more token of each text, from a state of constant size.

    Args:
        q: [B, H, 1, D]; k: [B, KV, 1, D]; v: [B, KV, 1, Dv].
        features: weights of the feature maps; or features, phi_q [B, H, 1, F] of the queries and phi_k [B, S, E, F] of
            `leaving_keys(state, k, spec, state_indices)`: keys are mapped when they have left the window.
        window_factor: [H].
        state: of B texts; with `state_indices` a pool of states of P texts. The ring's `phi_k` is not used.
        spec, log_decay [B, H, 1], sink_logits [H]: as in `hybrid_attention`.
        active: [B], 0 for rows whose token is padding: their output is 0, their state stays.
        state_indices: [B] int32 or int64, the row of the pool that belongs to each text, each at most once. Only these
            rows are read, and they are changed in place. -1 is a row without a text: its output is 0.
        donate: the caller has no more use for `state`, so that its memory may become that of the new one. The kernel
            then works in place; else it works on a copy, and copying takes as long as the step itself.
        impl: "triton" is the kernel; "auto" is the kernel on a GPU where it can run, in code that keeps no gradients;
            every other implementation has the step in torch, differentiable (but not through a pool).

    Returns:
        The output [B, H, 1, Dv] in the dtype of v. The new state, whose ring has no `phi_k`; with `state_indices` the
        pool itself.

    Raises:
        ValueError: a shape or a name that does not fit, or "triton" cannot run the step; the message says why.
    """
    check_step(q, k, v, features, state, spec, log_decay, sink_logits, active, state_indices)
    maps = features if isinstance(features, MapWeights) else None
    state = state._replace(window=state.window._replace(phi_k=None))
    if _use_kernel(impl, q, v, maps, window_factor, state, spec, state_indices):
        # Not at the top: Triton is a requirement neither of this package nor of the code that `lolcats export` writes.
        from lolcats.ops.hybrid.kernels.decode import decode_step

        if state_indices is None:
            state = state.map(lambda t: t.contiguous() if donate else t.clone(memory_format=torch.contiguous_format))
        pair = cast(MapWeights, maps), window_factor
        return decode_step(q, k, v, *pair, state, spec, log_decay, active, sink_logits, state_indices), state
    with without_autocast(q.device.type):  # the sums are fp32 whatever surrounds us
        if state_indices is None:
            return _torch_step(q, k, v, features, window_factor, state, spec, log_decay, active, sink_logits)
        held = state_indices >= 0
        rows = state.map(lambda t: t.index_select(0, state_indices.clamp_min(0)))
        active = held if active is None else held & (active > 0)
        out, new = _torch_step(q, k, v, features, window_factor, rows, spec, log_decay, active, sink_logits)
        _write(state, rows, new, state_indices, held)
        return out, state


def _torch_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: tuple[Tensor, Tensor] | MapWeights,
    window_factor: Tensor,
    state: HybridState,
    spec: HybridSpec,
    log_decay: Tensor | None,
    active: Tensor | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, HybridState]:
    if isinstance(features, MapWeights):
        phi_q, phi_leaving = features.phi_q(q), features.phi_k(leaving_keys(state, k, spec))
    else:
        phi_q, phi_leaving = features
    if log_decay is not None:  # one decay per query head needs one state per query head
        phi_leaving = phi_leaving.repeat_interleave(q.shape[1] // phi_leaving.shape[1], 1)
    return recurrent_step(q, k, v, phi_q, phi_leaving, window_factor, state, spec, log_decay, active, sink_logits)


@torch.no_grad()
def _write(pool: HybridState, rows: HybridState, new: HybridState, state_indices: Tensor, held: Tensor) -> None:
    """Put what is new of the rows into the pool, where they have a place there."""
    at = state_indices[held]
    for into, before, after in zip(pool.tensors(), rows.tensors(), new.tensors(), strict=True):
        if after is not before:
            into[at] = after[held].to(into.dtype)


def _use_kernel(
    impl: str,
    q: Tensor,
    v: Tensor,
    maps: MapWeights | None,
    window_factor: Tensor,
    state: HybridState,
    spec: HybridSpec,
    state_indices: Tensor | None,
) -> bool:
    """Whether the kernel makes the step; ValueError where it is asked for and cannot."""
    if resolve_impl(impl) not in ("auto", "triton"):
        return False
    if impl == "auto" and (torch.is_grad_enabled() or not kernels_available(q.device)):
        return False
    needs_grad = any(t.requires_grad for t in (q, v, window_factor, *(() if maps is None else (maps.q, maps.k))))
    reason = _refusal(q, v, maps, spec, needs_grad)
    if reason is None and state_indices is not None and not all(contiguous_rows(t) for t in state.tensors()):
        reason = ROWS_APART
    if reason is not None and impl == "triton":
        raise ValueError(f"impl 'triton' cannot run this decoding step: {reason}; use impl 'auto'")
    return reason is None


def _refusal(q: Tensor, v: Tensor, maps: MapWeights | None, spec: HybridSpec, needs_grad: bool) -> str | None:
    """Why the kernel cannot run a step, or None."""
    if not kernels_available(q.device) and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA device of compute capability 8.0 or later; the tensors are on {q.device}"
    if torch.compiler.is_compiling():
        return "it does not run under torch.compile"
    if torch.is_grad_enabled() and needs_grad:
        return "it gives no gradients; decode under torch.no_grad()"
    if maps is None:
        return "it makes the features itself, of 'hedgehog' and 't2r' only and from their weights; got features"
    from lolcats.ops.hybrid.kernels.decode import step_refusal

    return step_refusal(q, v, maps, spec)
