"""Near attention by the Triton kernels: differentiable in q, k, v and the learned sinks, not in a state."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lolcats.ops.devices import capability, device_of
from lolcats.ops.hybrid.kernels.launch import SMALLEST, either, on, padded, pieces, precision, strides
from lolcats.ops.hybrid.kernels.tiles import LOG2E
from lolcats.ops.near.kernels.backward import add_slots, key_gradients, query_gradients, slot_gradients
from lolcats.ops.near.kernels.forward import near_forward
from lolcats.ops.near.selection import EMPTY, Selection
from lolcats.ops.near.types import NearSpec, NearState

BLOCK = 128
"""Queries of a block, C: those that share one list of kept pairs. The selection must be made for it."""
LARGEST = 128
"""Largest D and Dv."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BY_QUERIES = {"ROWS": 128, "KEYS": 64, "STAGES": 2, "num_warps": 8}
BY_KEYS = {"ROWS": 64, "KEYS": 64, "STAGES": 2, "num_warps": 4}
WIDE = {"ROWS": 64, "KEYS": 64, "STAGES": 1, "num_warps": 4}
"""Queries and keys of a tile, and tiles on their way; wide numbers, float32, take twice the shared memory."""
COLUMNS = 16
"""Columns of a program of `add_slots`: these add up one block after the other, so many of them run at once."""


def refusal(q: Tensor, k: Tensor, v: Tensor, no_gradient: bool, sink_logits: Tensor | None) -> str | None:
    """Why the kernels cannot run a call, or None."""
    if torch.compiler.is_compiling():
        return "it runs in eager code, not under torch.compile"
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA device; the tensors are on {q.device}"
    if q.device.type == "cuda" and capability(q.device) < (8, 0):
        return "it needs compute capability 8.0 or later"
    if any(x.dtype not in DTYPES for x in (q, k, v)):
        return f"it takes bfloat16, float16 and float32; got {q.dtype}, {k.dtype} and {v.dtype}"
    if max(q.shape[-1], v.shape[-1]) > LARGEST:
        return f"it takes head sizes up to {LARGEST}; got D {q.shape[-1]}, Dv {v.shape[-1]}"
    tensors = [x for x in (q, k, v, sink_logits) if x is not None]
    if no_gradient and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "it gives no gradient to a state, or where sinks have queries of their own"
    return None


class Operands(NamedTuple):
    """Tensors that get gradients: q [B, H, N, D], k and v [B, KV, N, .], one dtype; [H] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink_logits: Tensor | None


class Context(NamedTuple):
    """What else a call needs; None where there is none of it."""

    before: Tensor | None
    """[B, KV, blocks, P] int32."""
    until: Tensor | None
    """[B, KV, P + N] int32; 0 for pairs of the state that are empty."""
    lengths: Tensor | None
    """[B]."""
    start: Tensor | None
    """[B], with a state: tokens before these."""
    held_k: Tensor | None
    """[B, KV, w + P + s, D], with a state: its ring, kept pairs and sinks."""
    held_v: Tensor | None

    def flags(self) -> dict[str, bool]:
        """Which of them there are, as far as kernels ask."""
        return {"HAS_LENGTHS": self.lengths is not None, "HAS_STATE": self.start is not None}


@dataclass(frozen=True)
class Plan:
    """Sizes of one call and how it is cut."""

    spec: NearSpec
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    d: int
    dv: int
    dtype: torch.dtype

    @property
    def blocks(self) -> int:
        """Blocks of a text."""
        return pieces(self.tokens, BLOCK)

    @property
    def slots(self) -> int:
        """Slots of a block: sinks and kept pairs."""
        return self.spec.sinks + self.spec.pairs

    def counts(self) -> tuple[int, int, int, int]:
        """What kernels call tokens, blocks, window and pairs."""
        return self.tokens, self.blocks, self.spec.window, self.spec.pairs

    def visible(self) -> dict[str, int]:
        """Which keys are seen, so far as it decides what a kernel does: all else it is told at run time."""
        return {"SINKS": self.spec.sinks, "HAS_PAIRS": self.spec.pairs > 0, "C": BLOCK}

    def sizes(self) -> dict[str, Any]:
        """What all products need to know."""
        return {
            "HEADS": self.heads,
            "GROUP": self.heads // self.kv_heads,
            "D": self.d,
            "BD": max(SMALLEST, padded(self.d)),
            "DV": self.dv,
            "BV": max(SMALLEST, padded(self.dv)),
            "SOFTCAP": float(self.spec.softcap or 0.0),
            "PRECISION": precision(self.dtype),
            **self.visible(),
        }

    def by_queries(self) -> dict[str, int]:
        """How programs that stand for queries are cut."""
        return WIDE if self.dtype == torch.float32 else BY_QUERIES

    def by_keys(self) -> dict[str, int]:
        """How programs that stand for keys are cut: large heads need the registers of more threads."""
        if self.dtype == torch.float32:
            return WIDE
        return BY_KEYS | ({"num_warps": 8} if max(self.d, self.dv) > 64 else {})

    @property
    def scale(self) -> float:
        """Of the products."""
        return self.spec.product_scale(self.d)


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass."""

    out: Tensor
    lse: Tensor
    """[B, H, N] fp32, to the base of two."""


def kernel_near(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: NearSpec,
    chosen: Selection | None,
    lengths: Tensor | None,
    sink_logits: Tensor | None,
    state: NearState | None,
    sink_q: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """The output [B, H, N, Dv] of near attention, 0 at padding.

    Args:
        q: [B, H, N, D]; k: [B, KV, N, D]; v: [B, KV, N, Dv], of the sizes that `refusal` lets through.
        spec: as in `near_attention`.
        chosen: the kept pairs in blocks of `BLOCK` queries, of a fresh text empty ones last.
        lengths: [B] or None.
        sink_logits: [H] or None.
        state: what came before, or None.
        sink_q: [B, H, N, D] or None; with it there are no gradients.
        sizes: [KV, 2] int32, window and kept pairs of each key head, where these differ; then there are no gradients.
            `spec` has the largest of each, as `chosen` and `state` do, where the pairs that are too many are surplus.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q.to(v.dtype), k.to(v.dtype), v))
    before = until = start = held_k = held_v = None
    if chosen is not None:
        before, until = chosen.before.int().contiguous(), chosen.until.int().contiguous()
    if state is not None:
        start, kept, sinks = state.length, state.kept, state.sinks
        held_k, held_v = (
            torch.cat([x for x in parts if x is not None], 2).to(v.dtype).contiguous()
            for parts in (
                (state.ring.k, kept and kept.k, sinks and sinks.k),
                (state.ring.v, kept and kept.v, sinks and sinks.v),
            )
        )
        if until is not None and kept is not None:
            until[:, :, : spec.pairs].masked_fill_(kept.score.abs() == -EMPTY, 0)  # and of surplus ones
    context = Context(before, until, lengths, start, held_k, held_v)
    with device_of(v):
        if sink_q is not None:
            q, sink_q = q.contiguous(), sink_q.to(q.dtype).contiguous()
        x = Operands(q, k, v, sink_logits)
        # `needs_input_grad` would be true of learned sinks under `no_grad` too.
        learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in x)
        if sink_q is not None or sizes is not None or not learns:
            return run_forward(_plan(spec, q, v), x, context, False, sink_q, sizes).out
        out = _Near.apply(spec, context, *x)
    assert isinstance(out, Tensor)
    return out


def _plan(spec: NearSpec, q: Tensor, v: Tensor) -> Plan:
    (batch, heads, n, size), (kv_heads, dv) = q.shape, (v.shape[1], v.shape[3])
    return Plan(spec, batch, heads, kv_heads, n, size, dv, v.dtype)


class _Near(torch.autograd.Function):
    """The kernels, for autograd. Arguments: spec, context, then the operands."""

    @staticmethod
    def forward(ctx: Any, spec: NearSpec, context: Context, *operands: Tensor | None) -> Tensor:
        x = Operands(*operands)  # type: ignore[arg-type]
        plan = _plan(spec, x.q, x.v)
        saved = run_forward(plan, x, context, True)
        ctx.plan = plan
        ctx.save_for_backward(*x, *saved, *context)
        return saved.out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        x, saved, context = Operands(*tensors[:4]), Saved(*tensors[4:6]), Context(*tensors[6:])
        with device_of(x.v):
            return None, None, *run_backward(ctx.plan, x, context, saved, grad_outputs[0], ctx.needs_input_grad[5])


def run_forward(
    p: Plan, x: Operands, c: Context, save: bool, sink_q: Tensor | None = None, sizes: Tensor | None = None
) -> Saved:
    """Output and, with `save`, the log-sum-exps; `sink_q` is laid out as q, and `sizes` are those of `kernel_near`."""
    out = _like_projection(p, p.heads, p.dv, x.v)
    lse = torch.empty((p.batch, p.heads, p.tokens) if save else (1,), dtype=torch.float32, device=x.v.device)
    cut = p.by_queries()
    on(near_forward, (p.heads, pieces(p.tokens, cut["ROWS"]), p.batch))(
        x.q, x.k, x.v, *(either(t, x.q) for t in (*c, x.sink_logits, sink_q, sizes)), out, lse,
        *strides(x.q), *strides(x.k), *strides(x.v), *strides(out), *p.counts(), p.scale,
        **p.sizes(), **c.flags(), LEARNED=x.sink_logits is not None, HAS_SINK_Q=sink_q is not None,
        HAS_SIZES=sizes is not None, SAVE=save, **cut,
    )  # fmt: skip
    return Saved(out, lse)


def run_backward(
    p: Plan, x: Operands, c: Context, saved: Saved, grad: Tensor, need_logits: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of the operands."""
    grad = grad.to(p.dtype)
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    delta = torch.empty_like(saved.lse)
    dq = _like_projection(p, p.heads, p.d, x.q)
    dk, dv = _like_projection(p, p.kv_heads, p.d, x.k), _like_projection(p, p.kv_heads, p.dv, x.v)
    chosen = [either(t, x.q) for t in c]
    sizes, padding = p.sizes(), c.flags()
    shared = [*strides(x.q), *strides(x.k), *strides(x.v)]
    cut = p.by_queries()
    on(query_gradients, (p.heads, pieces(p.tokens, cut["ROWS"]), p.batch))(
        x.q, x.k, x.v, *chosen, saved.out, grad, saved.lse, delta, dq,
        *shared, *strides(saved.out), *strides(grad), *strides(dq), *p.counts(), p.scale,
        **sizes, **padding, **cut,
    )  # fmt: skip
    cut = p.by_keys()
    totals = _slot_totals(p, x, c, saved, grad, delta) if p.slots else (delta, delta)
    on(key_gradients, (pieces(p.tokens, cut["KEYS"]), p.kv_heads, p.batch))(
        x.q, x.k, x.v, *chosen[1:4], grad, saved.lse, delta, *totals, dk, dv,
        *shared, *strides(grad), *strides(dk), *strides(dv), p.tokens, p.spec.window, p.spec.pairs, p.scale,
        **sizes, **padding, **cut,
    )  # fmt: skip
    logits = None
    if need_logits and x.sink_logits is not None:
        weights = torch.exp2(x.sink_logits.float()[:, None] * LOG2E.value - saved.lse)
        logits = -(weights * delta).sum((0, 2)).to(x.sink_logits.dtype)
    return dq, dk, dv, logits


def _slot_totals(
    p: Plan, x: Operands, c: Context, saved: Saved, grad: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the slots of all blocks give to their keys and values: [B, KV, N, D] and [B, KV, N, Dv] fp32."""
    rows, cut = p.batch * p.kv_heads, p.by_keys()
    parts = [torch.empty(rows, p.blocks, p.slots, size, dtype=p.dtype, device=grad.device) for size in (p.d, p.dv)]
    totals = [torch.zeros(rows, p.tokens, size, dtype=torch.float32, device=grad.device) for size in (p.d, p.dv)]
    chosen, padding = [either(t, x.q) for t in c], c.flags()
    on(slot_gradients, (pieces(p.slots, cut["KEYS"]), p.blocks, rows))(
        x.q, x.k, x.v, *chosen, grad, saved.lse, delta, *parts,
        *strides(x.q), *strides(x.k), *strides(x.v), *strides(grad), *p.counts(), p.scale,
        **p.sizes(), **padding, **cut,
    )  # fmt: skip
    slots = padded(p.slots)
    on(add_slots, (pieces(max(p.d, p.dv), COLUMNS), rows, 2))(
        *parts, chosen[0], *chosen[2:4], *totals, *p.counts(), KV_HEADS=p.kv_heads, D=p.d, DV=p.dv,
        **p.visible(), **padding, SLOTS=slots, COLUMNS=COLUMNS, num_warps=min(16, max(4, slots // 64)), num_stages=1,
    )  # fmt: skip
    return totals[0], totals[1]


def _like_projection(p: Plan, heads: int, size: int, like: Tensor) -> Tensor:
    """Empty [B, heads, N, size] in the layout that the layer's projections want: no copy is needed there."""
    return torch.empty(p.batch, p.tokens, heads, size, dtype=p.dtype, device=like.device).transpose(1, 2)
