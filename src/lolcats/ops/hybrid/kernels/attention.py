"""Hybrid attention by the Triton kernels: differentiable, for features or for the weights of feature maps.

Padding and an initial state are brought into one form first: the tokens of each row of the batch, the ring of the state
before them, without gaps from index 0 on. Packed documents become rows of their own.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lolcats.ops.devices import capability
from lolcats.ops.hybrid.kernels.backward import run_backward
from lolcats.ops.hybrid.kernels.launch import Context, Operands, Saved, States, make_plan, run_forward, sum_states
from lolcats.ops.hybrid.kernels.segment_launch import refusal as segment_refusal
from lolcats.ops.hybrid.kernels.segment_launch import run_segments
from lolcats.ops.hybrid.layout import Extended, Inputs, extend, final_state, take_tokens, tokens_in_sums
from lolcats.ops.maps import MapWeights
from lolcats.ops.types import HybridOutput, HybridSpec, LinearState

LARGEST = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
"""Largest D, Dv and F."""
LARGEST_MAP = 128 * 128
"""Largest D times width of a map that the kernels compute; features of larger ones are made before."""


def refusal(inputs: Inputs, maps: MapWeights | None, return_state: bool) -> str | None:
    """Why the kernels cannot run a call, or None."""
    q, v = inputs.q, inputs.v
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if q.device.type != "cuda" and not interpreted:
        return f"it needs a CUDA device; the tensors are on {q.device}"
    if q.device.type == "cuda" and capability(q.device) < (8, 0):
        return "it needs compute capability 8.0 or later"
    if any(x.dtype not in LARGEST for x in (q, inputs.k, v)):
        return "it takes bfloat16, float16 and float32"
    features = inputs.phi_q.shape[-1] if maps is None else maps.q.shape[-1] * (2 if maps.kind == "hedgehog" else 1)
    largest = LARGEST[v.dtype]
    if max(q.shape[-1], v.shape[-1], features) > largest:
        return f"it takes sizes up to {largest} in {v.dtype}; got D {q.shape[-1]}, Dv {v.shape[-1]}, F {features}"
    tensors = [x for x in (*inputs[:7], inputs.sink_logits, *(maps or ())[1:]) if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and (return_state or inputs.state is not None) and any(x.requires_grad for x in tensors):
        return "it gives no gradient through a state"
    return None


def fits(q: Tensor, maps: MapWeights) -> bool:
    """Whether the kernels compute these maps themselves."""
    return q.shape[-1] * maps.q.shape[-1] <= LARGEST_MAP


def kernel_attention(
    inputs: Inputs, spec: HybridSpec, return_state: bool, maps: MapWeights | None = None
) -> HybridOutput:
    """Hybrid attention; arguments as checked by `hybrid_attention`.

    With `maps` the features in `inputs` are not looked at, and the ring of the state that is returned has none.
    """
    dtype = inputs.v.dtype
    inputs = inputs._replace(q=inputs.q.to(dtype), k=inputs.k.to(dtype))
    if maps is not None:  # what is done to tokens is done to features: here they are the tokens themselves
        state = inputs.state
        if state is not None:
            state = state._replace(window=state.window._replace(phi_k=state.window.k))
        inputs = inputs._replace(phi_q=inputs.q, phi_k=inputs.k, state=state)
    moved = inputs.state is not None or inputs.attention_mask is not None
    ext = extend(inputs, spec) if moved or return_state else None
    call = _Call(inputs, Context(), None)
    if inputs.segment_ids is not None:
        call = call._replace(context=_documents(inputs.segment_ids))
    elif ext is not None and moved:
        call = _aligned(inputs, ext)
    operands = _operands(call.inputs, maps)
    kind = "given" if maps is None else maps.kind
    # `needs_input_grad` would be true of parameters under `no_grad` too.
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands):
        out = _Attention.apply(kind, spec, call.context, *operands)
    else:
        out = _without_gradients(kind, spec, call.context, operands)
    assert isinstance(out, Tensor)
    if call.order is not None:
        out = take_tokens(out, call.order.argsort(dim=-1))[:, :, -inputs.q.shape[2] :]
    state = None
    if return_state:
        assert ext is not None
        with torch.no_grad():
            linear = _final_sums(kind, spec, call, operands, ext)
            state = final_state(inputs, ext, spec, torch.float32, linear)
            if maps is not None:
                state = state._replace(window=state.window._replace(phi_k=None))
    return HybridOutput(out, state)


class _Call(NamedTuple):
    """Tensors in the form that the kernels take, and the order [B, T] that their tokens were brought into."""

    inputs: Inputs
    context: Context
    order: Tensor | None


def _operands(inputs: Inputs, maps: MapWeights | None) -> Operands:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (inputs.q, inputs.k, inputs.v))
    decay = None if inputs.log_decay is None else inputs.log_decay.float().contiguous()
    logits = None if inputs.sink_logits is None else inputs.sink_logits.contiguous()
    if maps is None:
        phi_q, phi_k = (x.to(v.dtype).contiguous() for x in (inputs.phi_q, inputs.phi_k))
        return Operands(q, k, v, phi_q, phi_k, inputs.window_factor, sink_logits=logits, log_decay=decay)
    weights = [x if x is None else x.contiguous() for x in maps[1:6]]
    map_q, map_k, bias_q, bias_k, log_scale = weights
    assert map_q is not None and map_k is not None
    if decay is not None and map_k.shape[0] != q.shape[1]:  # one decay per query head needs one state per query head
        groups = q.shape[1] // map_k.shape[0]
        map_k, bias_k = (x if x is None else x.repeat_interleave(groups, 0) for x in (map_k, bias_k))
        assert map_k is not None
    return Operands(q, k, v, map_q, map_k, inputs.window_factor, bias_q, bias_k, log_scale, logits, decay)


def _aligned(inputs: Inputs, ext: Extended) -> _Call:
    """The extended sequence without gaps."""
    batch = inputs.q.shape[0]
    position = ext.position.expand(batch, -1)
    order = (position < 0).long().argsort(dim=-1, stable=True)
    q, phi_q = (take_tokens(nnf.pad(x, (0, 0, ext.ring, 0)), order) for x in (inputs.q, inputs.phi_q))
    k, v, phi_k = (take_tokens(x, order) for x in (ext.k, ext.v, ext.phi_k))
    decay = None if ext.log_decay is None else take_tokens(ext.log_decay, order)
    length = (position >= 0).sum(-1)
    first = position.gather(1, order[:, :1]).squeeze(1).clamp_min(0)
    rows = torch.stack([torch.arange(batch, device=first.device), torch.zeros_like(first), length, first], 1).int()
    context = Context(rows)
    if inputs.state is not None:
        initial = torch.cat([inputs.state.linear.kv.flatten(2), inputs.state.linear.k_sum], -1).float().contiguous()
        context = context._replace(initial=initial)
        if ext.sinks is not None:
            context = context._replace(sink_k=ext.sinks.k.to(v.dtype), sink_v=ext.sinks.v.to(v.dtype))
    moved = inputs._replace(q=q, k=k, v=v, phi_q=phi_q, phi_k=phi_k, log_decay=decay)
    return _Call(moved, context, order)


def _documents(segment_ids: Tensor) -> Context:
    """A row for each document of packed texts; `segment_ids` [B, N] as numbered by `hybrid_attention`."""
    n = segment_ids.shape[1]
    starts = nnf.pad(segment_ids[:, 1:] != segment_ids[:, :-1], (1, 0), value=True).nonzero()
    batch, start = starts.unbind(1)
    following = nnf.pad(starts[1:], (0, 0, 0, 1), value=-1)
    end = torch.where(following[:, 0] == batch, following[:, 1], n)
    rows = torch.stack([batch, start, end - start, torch.zeros_like(start)], 1)
    rows = rows[segment_ids[batch, start] >= 0].int().contiguous()
    return Context(rows, int(rows[:, 2].max()) if len(rows) else 1)


def _final_sums(kind: str, spec: HybridSpec, call: _Call, x: Operands, ext: Extended) -> LinearState:
    """The sums of the state after the last token."""
    summed = tokens_in_sums(ext, spec)
    if call.order is not None:
        summed = summed.gather(1, call.order)
    if x.log_decay is not None:
        x = x._replace(log_decay=torch.where(summed[:, None], x.log_decay, 0.0))
    x = _lowered(x, kind)
    plan = make_plan(x, call.context, spec, kind)
    _, final = sum_states(plan, x, call.context, x.v, keep=summed.float().contiguous())
    assert final is not None
    kv, k_sum = final.split([plan.f * plan.dv, plan.f], -1)
    return LinearState(kv.unflatten(-1, (plan.f, plan.dv)).contiguous(), k_sum.contiguous())


def _lowered(x: Operands, kind: str) -> Operands:
    """The maps' weights in the type of the products, converted once rather than by every program."""
    x = x._replace(window_factor=x.window_factor.float())
    return x if kind == "given" else x._replace(map_q=x.map_q.to(x.v.dtype), map_k=x.map_k.to(x.v.dtype))


def _without_gradients(kind: str, spec: HybridSpec, context: Context, operands: Operands) -> Tensor:
    """The output alone."""
    x = _lowered(operands, kind)
    plan = make_plan(x, context, spec, kind)
    if segment_refusal(plan, x, context) is None:
        return run_segments(plan, x)
    return run_forward(plan, x, context, save=False).out


class _Attention(torch.autograd.Function):
    """The kernels, for autograd. Arguments: kind of features, spec, context, then the operands."""

    @staticmethod
    def forward(ctx: Any, kind: str, spec: HybridSpec, context: Context, *operands: Tensor | None) -> Tensor:
        x = _lowered(Operands(*operands), kind)  # type: ignore[arg-type]
        plan = make_plan(x, context, spec, kind)
        saved = run_forward(plan, x, context, save=True)
        ctx.plan, ctx.context = plan, context
        ctx.dtypes = [None if t is None else t.dtype for t in operands]
        states = saved.states
        ctx.numbers = None if states is None else states[5:]
        tensors = [*x, *saved[:3], *saved[4:], *((None,) * 5 if states is None else states[:5])]
        ctx.save_for_backward(*tensors)
        return saved.out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        count = len(Operands._fields)
        x = Operands(*tensors[:count])
        out, inverse, maximum, sink_k, sink_v, *pointers = tensors[count:]
        states = None if ctx.numbers is None else States(*pointers, *ctx.numbers)
        saved = Saved(out, inverse, maximum, states, sink_k, sink_v)
        needs = ctx.needs_input_grad[3:]
        found = run_backward(ctx.plan, x, ctx.context, saved, grad_outputs[0], needs)
        grads = (
            g.to(dtype) if need and g is not None else None
            for g, dtype, need in zip(found, ctx.dtypes, needs, strict=True)
        )
        return None, None, None, *grads
