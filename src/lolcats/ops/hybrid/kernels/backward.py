"""The launches of the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lolcats.ops.hybrid.kernels.backward_features import key_features, output_terms, query_features, weight_kernel
from lolcats.ops.hybrid.kernels.backward_inputs import NOWHERE, key_inputs, query_inputs
from lolcats.ops.hybrid.kernels.backward_values import key_values
from lolcats.ops.hybrid.kernels.launch import (
    BLOCK,
    SUM_PROGRAMS,
    TILE,
    Context,
    Operands,
    Plan,
    Saved,
    can_describe,
    either,
    feature_strides,
    flags,
    on,
    padded,
    pieces,
    precision,
    state_arguments,
    strides,
    sum_states,
)
from lolcats.ops.hybrid.kernels.tiles import LOG2E


class Gradients(NamedTuple):
    """Gradients of `Operands`, in its order."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    map_q: Tensor | None
    map_k: Tensor | None
    window_factor: Tensor | None
    bias_q: Tensor | None
    bias_k: Tensor | None
    factor: Tensor | None
    sink_logits: Tensor | None
    log_decay: Tensor | None


class _Rows(NamedTuple):
    """One number a query [B, H, N]: do.o, the linear pairs' share a, and where the row maximum is."""

    delta: Tensor
    linear: Tensor
    place: Tensor


def run_backward(p: Plan, x: Operands, c: Context, saved: Saved, grad: Tensor, needs: tuple[bool, ...]) -> Gradients:
    """Gradients of the operands; `needs` tells of each operand, in order, whether its gradient is wanted."""
    need = Operands(*needs)  # type: ignore[arg-type]
    grad = grad.to(x.v.dtype)
    grad = grad if grad.stride(3) == 1 and (not p.tma or can_describe(grad)) else grad.contiguous()
    make: Callable[..., Tensor] = torch.empty if c.rows is None else torch.zeros

    def per_query(dtype: torch.dtype = torch.float32) -> Tensor:
        return make(p.batch, p.heads, p.tokens, dtype=dtype, device=x.q.device)

    rows = _Rows(per_query(), per_query(), per_query(torch.int32))
    on(output_terms, (pieces(p.tokens, TILE), p.batch * p.heads))(
        saved.out, grad, rows.delta, *strides(saved.out), *strides(grad), p.tokens,
        HEADS=p.heads, DV=p.dv, BV=padded(p.dv), C=TILE,
    )  # fmt: skip
    inputs = bool(need.q or need.k or need.v or need.sink_logits)
    map_q, map_k = bool(need.map_q or need.bias_q), bool(need.map_k or need.bias_k)
    through = inputs and p.kind != "given"
    dy = _query_features(p, x, c, saved, grad, rows, map_q or through, make)
    d_map_q, d_bias_q = _map_gradient(p, x.q, dy, p.heads, x.bias_q is not None) if map_q else (None, None)
    dq, sinks = _query_inputs(p, x, c, saved, grad, rows, dy, make) if inputs else (None, None)
    dy, dv, key_part = _key_features(p, x, c, saved, grad, rows, inputs, map_k or through, make)
    d_map_k, d_bias_k = _map_gradient(p, x.k, dy, p.map_heads, x.bias_k is not None) if map_k else (None, None)
    dk = None if dv is None else _key_inputs(p, x, c, saved, grad, rows, dy, dv, sinks, make)
    total = rows.linear.sum((0, 2))
    decay = (rows.linear - key_part).flip(-1).cumsum(-1).flip(-1) if need.log_decay else None
    learned = _learned_gradient(x, saved, rows) if need.sink_logits else None
    factor = -(1 - torch.sigmoid(x.window_factor.float())) * total
    return Gradients(dq, dk, dv, d_map_q, d_map_k, factor, d_bias_q, d_bias_k, total, learned, decay)


def _features(p: Plan, x: Operands, make: Callable[..., Tensor]) -> Tensor:
    return make(p.batch, p.heads, p.tokens, p.width, dtype=x.v.dtype, device=x.q.device)


def _query_features(
    p: Plan,
    x: Operands,
    c: Context,
    saved: Saved,
    grad: Tensor,
    rows: _Rows,
    need_dy: bool,
    make: Callable[..., Tensor],
) -> Tensor | None:
    dy = _features(p, x, make) if need_dy else None
    pointers, numbers, constants = state_arguments(p, saved.states, rows.delta, p.sizes()["BV"])
    on(query_features, (p.heads, p.blocks, p.rows))(
        *_inputs(p, x), *_maps(p, x),
        either(x.log_decay, rows.delta), *pointers, either(c.rows, x.q), p.tokens_of(grad), saved.inverse, rows.delta,
        either(dy, x.q), rows.linear, *strides(x.q), *strides(x.k), *strides(x.v), *strides(grad),
        *feature_strides(p, x), p.tokens, *numbers,
        STATE_GROUP=p.heads // p.map_heads, MAP_GROUP=p.heads // p.map_heads, **flags(x, c), NEED_DY=need_dy,
        PRECISION=precision(x.v.dtype), **constants, MIXED=p.mixed, **p.window(), **p.sizes(),
        STAGES=p.stages, num_warps=4, num_stages=1,
    )  # fmt: skip
    return dy


def _query_inputs(
    p: Plan, x: Operands, c: Context, saved: Saved, grad: Tensor, rows: _Rows, dy: Tensor | None,
    make: Callable[..., Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
    # In the layout of q, as autograd wants it.
    dq = torch.empty_like(x.q) if c.rows is None else torch.zeros_like(x.q)
    s, kind = p.spec.sinks, {"dtype": torch.float32, "device": x.q.device}
    sinks = tuple(make(p.rows, p.heads, p.blocks, s, d, **kind) for d in (p.d, p.dv)) if s else None
    on(query_inputs, (p.heads, p.blocks, p.rows))(
        *_inputs(p, x), p.map_of(x.map_q), x.window_factor, either(x.sink_logits, x.q), either(saved.sink_k, x.q),
        either(saved.sink_v, x.q), either(c.rows, x.q), p.tokens_of(grad), saved.inverse, rows.delta, rows.linear,
        either(dy, x.q), dq, rows.place, *(sinks or (rows.delta, rows.delta)),
        *strides(x.q), *strides(x.k), *strides(x.v), *strides(grad), *strides(dq), p.tokens, p.blocks,
        p.spec.score_scale(p.d), BS=padded(s), LEARNED=x.sink_logits is not None, HAS_ROWS=c.rows is not None,
        PRECISION=precision(x.v.dtype), **p.softmax(), **_without(p.sizes(), "F", "T"), num_warps=4, num_stages=1,
    )  # fmt: skip
    return dq, None if sinks is None else (sinks[0].sum(2), sinks[1].sum(2))


def _key_features(
    p: Plan, x: Operands, c: Context, saved: Saved, grad: Tensor, rows: _Rows, need_dv: bool, need_dy: bool,
    make: Callable[..., Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    dv = make(p.batch, p.kv_heads, p.tokens, p.dv, dtype=x.v.dtype, device=x.q.device) if need_dv else None
    dy = _features(p, x, make) if need_dy else None
    key_part = torch.zeros_like(rows.linear) if x.log_decay is not None else rows.linear
    states = sum_states(p, x, c, grad, (saved.inverse, rows.delta))[0] if p.groups > 1 else None
    pointers, numbers, constants = state_arguments(p, states, rows.delta, p.sizes()["BV"])
    shared = {"MAP_GROUP": p.heads // p.map_heads, "FIRST": p.first, "PRECISION": precision(x.v.dtype)}
    shared |= {**flags(x, c), **constants, **p.window(), **p.sizes(), "num_warps": 4, "num_stages": 1}
    q, k, v = _inputs(p, x)
    maps = _maps(p, x)
    decay, row_table = either(x.log_decay, rows.delta), either(c.rows, x.q)
    on(key_features, (p.heads, p.blocks, p.rows))(
        q, k, v, *maps, decay, *pointers, row_table, p.tokens_of(grad), saved.inverse, rows.delta, either(dy, x.q),
        key_part, *strides(x.q), *strides(x.k), *strides(x.v), *strides(grad), *feature_strides(p, x), p.tokens,
        *numbers, NEED_DY=need_dy, **shared,
    )  # fmt: skip
    if dv is not None:
        local, _, local_decay, after, _ = pointers
        on(key_values, (p.kv_heads, p.blocks, p.rows))(
            q, k, *maps, decay, local, local_decay, after, row_table, p.tokens_of(grad), saved.inverse, dv,
            *strides(x.q), *strides(x.k), *strides(grad), *feature_strides(p, x), p.tokens, *numbers, **shared,
        )  # fmt: skip
    return dy, dv, key_part


def _key_inputs(
    p: Plan, x: Operands, c: Context, saved: Saved, grad: Tensor, rows: _Rows, dy: Tensor | None, dv: Tensor,
    sinks: tuple[Tensor, Tensor] | None, make: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    dk = make(p.batch, p.kv_heads, p.tokens, p.d, dtype=x.v.dtype, device=x.q.device)
    on(key_inputs, (p.kv_heads, p.blocks, p.rows))(
        *_inputs(p, x), p.map_of(x.map_k), x.window_factor, either(c.rows, x.q), p.tokens_of(grad),
        saved.inverse, rows.delta, saved.maximum,
        rows.linear, rows.place, *(sinks or (rows.delta, rows.delta)), either(dy, x.q), dk, dv,
        *strides(x.q), *strides(x.k), *strides(x.v), *strides(grad), p.tokens, p.spec.score_scale(p.d),
        MAP_GROUP=p.heads // p.map_heads, HAS_SINKS=sinks is not None, HAS_ROWS=c.rows is not None,
        PRECISION=precision(x.v.dtype), **p.softmax(), **_without(p.sizes(), "F", "T"), num_warps=4, num_stages=1,
    )  # fmt: skip
    return dk


def _inputs(p: Plan, x: Operands) -> tuple[Any, Any, Any]:
    return p.tokens_of(x.q), p.tokens_of(x.k), p.tokens_of(x.v)


def _maps(p: Plan, x: Operands) -> tuple[Any, ...]:
    return p.map_of(x.map_q), p.map_of(x.map_k), either(x.bias_q, x.q), either(x.bias_k, x.q), either(x.factor, x.q)


def _without(sizes: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in sizes.items() if k not in names}


def _map_gradient(
    p: Plan, inputs: Tensor, dy: Tensor | None, heads: int, has_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of the features, or of the weights [heads, D, width] (and bias) of a map."""
    assert dy is not None
    if p.kind == "given":
        return (dy if heads == p.heads else dy.unflatten(1, (heads, -1)).sum(2)), None
    splits = max(1, min(pieces(p.tokens, BLOCK), SUM_PROGRAMS // (p.batch * p.heads)))
    shape = (p.batch, p.heads, splits, p.d + 1, p.width)
    partial = torch.empty(shape, dtype=torch.float32, device=dy.device)
    sizes = {k: v for k, v in p.sizes().items() if k in ("D", "BD", "WIDTH", "BF", "C")}
    on(weight_kernel, (p.heads, splits, p.batch))(
        inputs, dy, partial, *strides(inputs), p.tokens, splits, X_GROUP=p.heads // inputs.shape[1], HEADS=p.heads,
        **sizes, PRECISION=precision(inputs.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip
    total = partial.sum((0, 2)).unflatten(0, (heads, -1)).sum(1)
    return total[:, :-1], (total[:, -1] if has_bias else None)


def _learned_gradient(x: Operands, saved: Saved, rows: _Rows) -> Tensor:
    """Gradient of the learned sinks' logits [H]: weights without a value."""
    assert x.sink_logits is not None
    logit = x.sink_logits.float()[:, None] * LOG2E.value
    gate = torch.sigmoid(x.window_factor.float())[:, None]
    weight = gate * torch.exp2(logit - saved.maximum)
    is_top = (rows.place == NOWHERE.value) & (saved.maximum == logit)
    return (-weight * rows.delta * saved.inverse + torch.where(is_top, rows.linear, 0.0)).sum((0, 2))
