"""What a call of a recurrence must be: each mistake is a ValueError that says what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats.ops.hybrid.checks import expect
from lolcats.ops.recurrence.layout import Inputs
from lolcats.ops.recurrence.types import RecurrentState


def check_recurrence(inputs: Inputs, normalised: bool, state_dtype: torch.dtype | None, return_state: bool) -> None:
    """Check all arguments of `recurrence`.

    Raises:
        ValueError: a shape or a combination that does not fit.
    """
    _check_shapes(inputs.q, inputs.k, inputs.v)
    _check_gates(inputs, normalised)
    _check_masks(inputs, return_state)
    if inputs.state is not None:
        _check_state(inputs.state, inputs, normalised)
    fits = state_dtype is None or state_dtype.is_floating_point
    expect(fits, "a state_dtype of floating point, or None", state_dtype)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect(x.ndim == 4, f"{name} with 4 dimensions [batch, heads, tokens, size]", tuple(x.shape))
        expect(x.is_floating_point(), f"{name} of floating point", x.dtype)
    batch, heads, n, features = q.shape
    kv_heads = v.shape[1]
    expect(n >= 1, "at least one token", n)
    multiple = kv_heads >= 1 and heads % kv_heads == 0
    expect(multiple, f"query heads ({heads}) to be a multiple of value heads", kv_heads)
    expect(v.shape[:3] == (batch, kv_heads, n), f"v {(batch, kv_heads, n)} and a value size", tuple(v.shape))
    allowed = [(batch, h, n, features) for h in (heads, kv_heads)]
    expect(tuple(k.shape) in allowed, f"k {allowed[0]} or {allowed[1]}", tuple(k.shape))


def _check_gates(inputs: Inputs, normalised: bool) -> None:
    per_head, per_channel = tuple(inputs.k.shape[:3]), tuple(inputs.k.shape)
    if inputs.log_decay is not None:
        got = tuple(inputs.log_decay.shape)
        expect(got in (per_head, per_channel), f"log_decay {per_head} or {per_channel}", got)
    if inputs.beta is not None:
        expect(inputs.beta.shape == per_head, f"beta {per_head}", tuple(inputs.beta.shape))
        expect(not normalised, "normalised only without beta: the delta rule has no sum to divide by", "both")


def _check_masks(inputs: Inputs, return_state: bool) -> None:
    rows = inputs.q.shape[0], inputs.q.shape[2]
    for name, x in (("attention_mask", inputs.attention_mask), ("segment_ids", inputs.segment_ids)):
        if x is not None:
            expect(x.shape == rows, f"{name} {rows}", tuple(x.shape))
    if inputs.segment_ids is not None:
        alone = inputs.attention_mask is None and inputs.state is None and not return_state
        expect(alone, "segment_ids without attention_mask, initial_state or return_state", "a combination")


def _check_state(state: RecurrentState, inputs: Inputs, normalised: bool) -> None:
    batch, heads, _, features = inputs.k.shape
    size = (batch, heads, features, inputs.v.shape[3])
    expect(state.kv.shape == size, f"a state with kv {size}", tuple(state.kv.shape))
    expect(state.length.shape == (batch,), f"a state with length ({batch},)", tuple(state.length.shape))
    held = None if state.k_sum is None else tuple(state.k_sum.shape)
    wanted = size[:3] if normalised else None
    expect(held == wanted, f"a state with k_sum {wanted}, as normalised is {normalised}", held)
