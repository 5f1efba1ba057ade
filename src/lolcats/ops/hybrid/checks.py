"""What a call of hybrid attention must be: each mistake is a ValueError that says what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats.ops.hybrid.layout import Inputs
from lolcats.ops.maps import MapWeights
from lolcats.ops.types import HybridSpec, HybridState


def check_call(
    inputs: Inputs, spec: HybridSpec, maps: MapWeights | None, return_state: bool, texts: int | None = None
) -> None:
    """Check all arguments of `hybrid_attention`; `texts` are packed into one row where it is not None.

    Raises:
        ValueError: a shape, a number or a name that does not fit.
    """
    _check_shapes(*inputs[:6])
    if maps is not None:
        check_maps(maps, inputs.q, inputs.k)
    check_spec(spec)
    _check_optional(inputs, return_state)
    if inputs.state is not None:
        rows = inputs.q.shape[0] if texts is None else texts
        check_state(inputs.state, rows, spec, inputs.log_decay is not None, maps is None)


def read_cuts(cu_seqlens: Tensor, inputs: Inputs) -> list[int]:
    """The numbers of `cu_seqlens` [T + 1], checked.

    Raises:
        ValueError: they do not cut the one row of `inputs`, or a mask says something else about it.
    """
    whole = cu_seqlens.dtype in (torch.int32, torch.int64)
    what = "cu_seqlens of one dimension, int32 or int64, with the ends of at least one text"
    expect(whole and cu_seqlens.ndim == 1 and len(cu_seqlens) >= 2, what, (tuple(cu_seqlens.shape), cu_seqlens.dtype))
    alone = inputs.attention_mask is None and inputs.segment_ids is None
    expect(alone, "cu_seqlens without attention_mask or segment_ids", "a combination")
    expect(inputs.q.shape[0] == 1, "with cu_seqlens all texts in one row, a batch of 1", inputs.q.shape[0])
    cuts = cu_seqlens.tolist()
    rising = cuts[0] == 0 and cuts == sorted(cuts) and cuts[-1] == inputs.q.shape[2]
    expect(rising, f"cu_seqlens that rise from 0 to the number of tokens, {inputs.q.shape[2]}", cuts)
    return cuts


def expect(condition: bool, what: str, got: object) -> None:
    """Raise a ValueError unless `condition` holds."""
    if not condition:
        raise ValueError(f"expected {what}; got {got}")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, window_factor: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("phi_q", phi_q), ("phi_k", phi_k)):
        expect(x.ndim == 4, f"{name} with 4 dimensions [batch, heads, tokens, size]", tuple(x.shape))
    batch, heads, n, size = q.shape
    kv_heads = k.shape[1]
    expect(n >= 1, "at least one token", n)
    expect(heads % kv_heads == 0, f"query heads ({heads}) to be a multiple of key heads", kv_heads)
    expect(k.shape == (batch, kv_heads, n, size), f"k {(batch, kv_heads, n, size)}", tuple(k.shape))
    expect(v.shape[:3] == (batch, kv_heads, n), f"v {(batch, kv_heads, n)} and a value size", tuple(v.shape))
    expect(phi_q.shape[:3] == (batch, heads, n), f"phi_q {(batch, heads, n)} and a feature size", tuple(phi_q.shape))
    features = phi_q.shape[-1]
    allowed = [(batch, h, n, features) for h in (heads, kv_heads)]
    expect(tuple(phi_k.shape) in allowed, f"phi_k {allowed[0]} or {allowed[1]}", tuple(phi_k.shape))
    expect(window_factor.shape == (heads,), f"window_factor ({heads},)", tuple(window_factor.shape))


def check_maps(maps: MapWeights, q: Tensor, k: Tensor) -> None:
    """Check that the maps' weights are for q [B, H, N, D] and k [B, KV, N, D]."""
    heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[3]
    expect(maps.q.ndim == 3 and maps.k.ndim == 3, "maps with weights [heads, D, f]", (maps.q.shape, maps.k.shape))
    width = maps.q.shape[2]
    expect(tuple(maps.q.shape) == (heads, size, width), f"maps.q ({heads}, {size}, f)", tuple(maps.q.shape))
    allowed = [(h, size, width) for h in (heads, kv_heads)]
    expect(tuple(maps.k.shape) in allowed, f"maps.k {allowed[0]} or {allowed[1]}", tuple(maps.k.shape))


def check_spec(spec: HybridSpec) -> None:
    """Check the numbers and names of `spec`."""
    expect(spec.window_kind in ("sliding", "terraced"), "window_kind 'sliding' or 'terraced'", repr(spec.window_kind))
    smallest = 1 if spec.window_kind == "terraced" else 0
    window, sinks = spec.window, spec.sinks
    expect(isinstance(window, int) and window >= smallest, f"an integer window >= {smallest}", window)
    expect(isinstance(sinks, int) and sinks >= 0, "an integer number of sinks >= 0", sinks)
    expect(isinstance(spec.fold, int) and spec.fold >= 1, "an integer fold >= 1", spec.fold)
    expect(spec.softcap is None or spec.softcap > 0, "a softcap > 0, or None", spec.softcap)


def _check_optional(inputs: Inputs, return_state: bool) -> None:
    batch, heads, n, _ = inputs.q.shape
    log_decay, sink_logits = inputs.log_decay, inputs.sink_logits
    if log_decay is not None:
        expect(log_decay.shape == (batch, heads, n), f"log_decay {(batch, heads, n)}", tuple(log_decay.shape))
    if sink_logits is not None:
        expect(sink_logits.shape == (heads,), f"sink_logits ({heads},)", tuple(sink_logits.shape))
    for name, x in (("attention_mask", inputs.attention_mask), ("segment_ids", inputs.segment_ids)):
        if x is not None:
            expect(x.shape == (batch, n), f"{name} {(batch, n)}", tuple(x.shape))
    if inputs.segment_ids is not None:
        alone = inputs.attention_mask is None and inputs.state is None and not return_state
        expect(alone, "segment_ids without attention_mask, initial_state or return_state", "a combination")


def check_state(state: HybridState, batch: int, spec: HybridSpec, decays: bool, features: bool) -> None:
    """Check that `state` holds `batch` texts of a call with `spec`, with features in its ring where asked for."""
    expect(state.length.shape == (batch,), f"a state for a batch of {batch}", tuple(state.length.shape))
    expect(state.window.k.shape[2] == spec.slots, f"a state with {spec.slots} window slots", state.window.k.shape[2])
    held = 0 if state.sinks is None else state.sinks.k.shape[2]
    expect(held == spec.sinks, f"a state with {spec.sinks} sinks", held)
    expect(not features or state.window.phi_k is not None, "a state whose window holds phi_k", "none")
    expect((state.window.log_decay is not None) == decays, f"a state {'with' if decays else 'without'} decay", "other")


def check_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: tuple[Tensor, Tensor] | MapWeights,
    state: HybridState,
    spec: HybridSpec,
    log_decay: Tensor | None,
    sink_logits: Tensor | None,
    active: Tensor | None,
    state_indices: Tensor | None,
) -> None:
    """Check the arguments of `hybrid_step`.

    Raises:
        ValueError: a shape, a number or a name that does not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect(x.ndim == 4 and x.shape[2] == 1, f"{name} [batch, heads, 1, size]", tuple(x.shape))
    batch, heads, _, size = q.shape
    kv_heads = k.shape[1]
    expect(heads % kv_heads == 0, f"query heads ({heads}) to be a multiple of key heads", kv_heads)
    expect(k.shape == (batch, kv_heads, 1, size), f"k {(batch, kv_heads, 1, size)}", tuple(k.shape))
    expect(v.shape[:2] == (batch, kv_heads), f"v {(batch, kv_heads, 1)} and a value size", tuple(v.shape))
    if isinstance(features, MapWeights):
        check_maps(features, q, k)
    check_spec(spec)
    if log_decay is not None:
        expect(log_decay.shape == (batch, heads, 1), f"log_decay {(batch, heads, 1)}", tuple(log_decay.shape))
    if sink_logits is not None:
        expect(sink_logits.shape == (heads,), f"sink_logits ({heads},)", tuple(sink_logits.shape))
    if active is not None:
        expect(active.shape == (batch,), f"active ({batch},)", tuple(active.shape))
    rows = batch
    if state_indices is not None:
        whole = state_indices.dtype in (torch.int32, torch.int64) and state_indices.shape == (batch,)
        got = tuple(state_indices.shape), state_indices.dtype
        expect(whole, f"state_indices ({batch},) of int32 or int64", got)
        rows = len(state.length)
    check_state(state, rows, spec, log_decay is not None, False)
