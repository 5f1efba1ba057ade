"""What the implementations share: the tensors of a call, padding and packed texts, and values with a column of ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lolcats.ops.recurrence.types import RecurrentState
from lolcats.ops.types import accumulation_dtype


class Inputs(NamedTuple):
    """The tensors of one call, checked; shapes as in `recurrence`."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    attention_mask: Tensor | None
    segment_ids: Tensor | None
    state: RecurrentState | None


class Spec(NamedTuple):
    """What the implementations are told besides tensors."""

    normalised: bool
    scale: float


class Sums(NamedTuple):
    """The two sums of a state in the dtype of the accumulation."""

    kv: Tensor  # [B, S, F, Dv]
    k_sum: Tensor | None  # [B, S, F]


Implementation = Callable[[Inputs, Spec, bool], tuple[Tensor, Sums | None]]
"""(inputs as `without_padding` makes them; spec; whether sums are wanted) -> output [B, H, N, Dv] and the sums."""


def dtype_of_sums(inputs: Inputs) -> torch.dtype:
    """float64 where any input is float64, else float32."""
    gates = (x for x in (inputs.log_decay, inputs.beta) if x is not None)
    return accumulation_dtype(inputs.q, inputs.k, inputs.v, *gates)


def real_tokens(inputs: Inputs) -> Tensor | None:
    """Which tokens [B, N] are no padding; None where all are real."""
    if inputs.segment_ids is not None:
        return inputs.segment_ids >= 0
    return None if inputs.attention_mask is None else inputs.attention_mask > 0


def text_starts(segment_ids: Tensor) -> Tensor:
    """Where [B, N] a run of equal ids begins: each is a text (or padding) of its own."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return torch.nn.functional.pad(changes, (1, 0), value=True)


def without_padding(inputs: Inputs) -> Inputs:
    """Padding made harmless: zeros give no output, add nothing to the state and do not decay it."""
    real = real_tokens(inputs)
    if real is None:
        return inputs

    def zeros_at_padding(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(real.view(real.shape[0], 1, -1, *[1] * (x.ndim - 3)), x, 0.0)

    return inputs._replace(
        **{name: zeros_at_padding(getattr(inputs, name)) for name in ("q", "k", "v", "log_decay", "beta")}
    )


def in_sums_dtype(inputs: Inputs) -> Inputs:
    """The tensors in the dtype of the sums, a value head for each state head, and a full decay where a text begins."""
    dtype = dtype_of_sums(inputs)
    q, k, v = (x.to(dtype) for x in inputs[:3])
    v = v.repeat_interleave(k.shape[1] // v.shape[1], 1)
    log_decay, beta = (None if x is None else x.to(dtype) for x in (inputs.log_decay, inputs.beta))
    if inputs.segment_ids is not None:
        log_decay = k.new_zeros(k.shape[:3]) if log_decay is None else log_decay
        starts = text_starts(inputs.segment_ids)[:, None]
        log_decay = log_decay.masked_fill(starts if log_decay.ndim == 3 else starts[..., None], -torch.inf)
    return inputs._replace(q=q, k=k, v=v, log_decay=log_decay, beta=beta)


def first_sums(inputs: Inputs, spec: Spec) -> Sums:
    """The sums before the first token; `inputs` are in their dtype."""
    k, state = inputs.k, inputs.state
    if state is not None:
        return Sums(state.kv.to(k.dtype), None if state.k_sum is None else state.k_sum.to(k.dtype))
    batch, heads, _, features = k.shape
    kv = k.new_zeros(batch, heads, features, inputs.v.shape[3])
    return Sums(kv, k.new_zeros(batch, heads, features) if spec.normalised else None)


def with_ones(v: Tensor) -> Tensor:
    """v [..., Dv] and a column of ones, which makes the sums without values: [..., Dv + 1]."""
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)


def joined(sums: Sums) -> Tensor:
    """Sums as the state of values `with_ones`, or of the values where there is no `k_sum`."""
    return sums.kv if sums.k_sum is None else torch.cat([sums.kv, sums.k_sum[..., None]], -1)


def parted(kv: Tensor, spec: Spec) -> Sums:
    """The inverse of `joined`."""
    return Sums(kv[..., :-1], kv[..., -1]) if spec.normalised else Sums(kv, None)


def quotient(out: Tensor, spec: Spec) -> Tensor:
    """The output of a call from q S_i [..., Dv], or from that of values `with_ones` [..., Dv + 1]."""
    return spec.scale * (divided(out[..., :-1], out[..., -1]) if spec.normalised else out)


def divided(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator [..., Dv] / denominator [...]; zero where that is 0."""
    seen = (denominator != 0)[..., None]  # NaN counts as seen: it must not be hidden
    return torch.where(seen, numerator / torch.where(seen, denominator[..., None], 1.0), 0.0)
