"""Hybrid attention in time and memory linear in N, in plain torch, differentiable.

The extended sequence (see layout.py) is cut in chunks of C tokens. A chunk of queries meets

* the sinks (softmax),
* the `local` keys: its own chunk and the p before it, enough to cover the window of every query in it. Some of these
  pairs are softmax pairs, some linear ones; both kinds of weights share one matrix and one product with the values,
* everything older through a carried state, the sum of phi_k v^T over the chunks before its local keys.

Shapes: nC chunks, K = (p + 1) C local keys, G = H / KV query heads per key head, g = state heads / KV (1 or G).
Memory a token and head: K scores, and F * Dv / C for the chunk states.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lolcats.ops.hybrid.layout import (
    Extended,
    Inputs,
    extend,
    final_state,
    pair_masks,
    sink_mask,
    take_tokens,
)
from lolcats.ops.hybrid.reference import divide
from lolcats.ops.hybrid.scan import carried_states
from lolcats.ops.hybrid.scores import cap_scores, row_max
from lolcats.ops.types import HybridOutput, HybridSpec, LinearState, SinkKeys, accumulation_dtype

CHUNK = 64
CPU_SPAN = 2048
"""Tokens that a CPU works on at once: with more, the intermediate results fall out of its caches."""


class _Chunks(NamedTuple):
    """The extended sequence in chunks; padded tokens have position -1."""

    q: Tensor  # [B, KV, nC, G, C, D]
    phi_q: Tensor  # [B, KV, nC, G, C, F]
    position: Tensor  # [b, nC, C]
    k_local: Tensor  # [B, KV, nC, K, D]
    v_local: Tensor  # [B, KV, nC, K, Dv]
    phi_local: Tensor  # [B, KV, nC, g, K, F]
    position_local: Tensor  # [b, nC, K]
    segment: Tensor | None  # [b, nC, C]
    segment_local: Tensor | None  # [b, nC, K]
    decay_local: Tensor | None  # [B, KV, nC, G, K]: cumulative sum of log_decay over the local keys


def chunked_attention(inputs: Inputs, spec: HybridSpec, return_state: bool) -> HybridOutput:
    """Linear-time hybrid attention; arguments as checked by `hybrid_attention`."""
    n, span = inputs.q.shape[2], max(CPU_SPAN, 8 * spec.window)
    if inputs.q.device.type != "cpu" or inputs.segment_ids is not None or n <= span:
        return _at_once(inputs, spec, return_state)
    outs, state = [], inputs.state
    parts = _split(inputs, span)
    for index, part in enumerate(parts):
        out, state = _at_once(part._replace(state=state), spec, return_state or index + 1 < len(parts))
        outs.append(out)
    return HybridOutput(torch.cat(outs, 2), state)


def _split(inputs: Inputs, span: int) -> list[Inputs]:
    """The call cut into calls of `span` tokens."""
    # Not slices: the gradient of each slice would be as large as the whole.
    names = ["q", "k", "v", "phi_q", "phi_k"] + ["log_decay"] * (inputs.log_decay is not None)
    pieces = [getattr(inputs, name).split(span, 2) for name in names]
    mask = inputs.attention_mask
    masks = [None] * len(pieces[0]) if mask is None else mask.split(span, 1)
    return [
        inputs._replace(attention_mask=m, **dict(zip(names, tensors, strict=True)))
        for m, *tensors in zip(masks, *pieces, strict=True)
    ]


def _at_once(inputs: Inputs, spec: HybridSpec, return_state: bool) -> HybridOutput:
    dtype = accumulation_dtype(inputs.q, inputs.v)
    ext = extend(inputs, spec)
    out = _forward(inputs, ext, spec, dtype)
    state = final_state(inputs, ext, spec, dtype) if return_state else None
    return HybridOutput(out.to(inputs.v.dtype), state)


@functools.cache
def _compiled() -> object:
    return torch.compile(_at_once, dynamic=False)


def compiled_attention(inputs: Inputs, spec: HybridSpec, return_state: bool) -> HybridOutput:
    """Chunked attention under torch.compile: for training, where the shapes stay the same."""
    return _compiled()(inputs, spec, return_state)  # type: ignore[operator]


def _forward(inputs: Inputs, ext: Extended, spec: HybridSpec, dtype: torch.dtype) -> Tensor:
    """[B, H, N, Dv] in `dtype`."""
    n = inputs.q.shape[2]
    q, phi_q = (nnf.pad(x, (0, 0, ext.ring, 0)) for x in (inputs.q, inputs.phi_q))
    order = None
    if inputs.attention_mask is not None:  # real tokens to the right end of each row: no holes inside a window
        order = (ext.position >= 0).long().argsort(dim=-1, stable=True)
        q, phi_q, ext = take_tokens(q, order), take_tokens(phi_q, order), _reordered(ext, order)
    chunks = _cut(q, phi_q, ext, spec, dtype)
    numerator, denominator = _local(chunks, ext.sinks, inputs, spec, dtype)
    carry_num, carry_den = _carried(chunks, inputs, spec)
    numerator, denominator = numerator + carry_num, denominator + carry_den
    total = ext.position.shape[1]
    numerator = numerator.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)[:, :, :total]
    denominator = denominator.permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)[:, :, :total]
    out = divide(numerator, denominator, ext.position)
    if order is not None:
        out = take_tokens(out, order.argsort(dim=-1))
    return out[:, :, total - n :]


def _reordered(ext: Extended, order: Tensor) -> Extended:
    decay = None if ext.log_decay is None else take_tokens(ext.log_decay, order)
    k, v, phi_k = (take_tokens(x, order) for x in (ext.k, ext.v, ext.phi_k))
    return Extended(k, v, phi_k, decay, ext.position.gather(1, order), None, ext.sinks, ext.length, ext.ring)


def _reach(spec: HybridSpec, total: int) -> int:
    """Chunks before a query's own that may hold softmax keys, p."""
    furthest = spec.window if spec.window_kind == "sliding" else 2 * spec.window
    return max(0, -(-(min(furthest, total) - 1) // CHUNK))


def _cut(q: Tensor, phi_q: Tensor, ext: Extended, spec: HybridSpec, dtype: torch.dtype) -> _Chunks:
    """Cut the extended sequence into chunks."""
    total, kv_heads = ext.position.shape[1], ext.k.shape[1]
    reach = _reach(spec, total)
    right = -total % CHUNK

    def own(x: Tensor) -> Tensor:  # [B, H, T, d] -> [B, KV, nC, G, C, d]
        x = nnf.pad(x.to(dtype), (0, 0, 0, right)).unflatten(2, (-1, CHUNK))
        return x.unflatten(1, (kv_heads, -1)).transpose(2, 3)

    def local(x: Tensor) -> Tensor:  # [B, h, T, d] -> [B, h, nC, K, d]
        # Not `unfold`: torch.compile gets its backward wrong on CPUs (torch 2.13).
        x = nnf.pad(x.to(dtype), (0, 0, reach * CHUNK, right)).unflatten(2, (-1, CHUNK))
        count = x.shape[2] - reach
        return torch.cat([x[:, :, i : i + count] for i in range(reach + 1)], 3)

    def rows(x: Tensor, left: int, value: int) -> Tensor:  # [b, T] -> [b, nC, left + C]
        return nnf.pad(x, (left, right), value=value).unfold(1, left + CHUNK, CHUNK)

    segment = ext.segment
    decay = None
    if ext.log_decay is not None:
        decay = local(ext.log_decay[..., None]).squeeze(-1).cumsum(-1).unflatten(1, (kv_heads, -1)).transpose(2, 3)
    return _Chunks(
        q=own(q),
        phi_q=own(phi_q),
        position=rows(ext.position, 0, -1),
        k_local=local(ext.k),
        v_local=local(ext.v),
        phi_local=local(ext.phi_k).unflatten(1, (kv_heads, -1)).transpose(2, 3),
        position_local=rows(ext.position, reach * CHUNK, -1),
        segment=None if segment is None else rows(segment, 0, -1),
        segment_local=None if segment is None else rows(segment, reach * CHUNK, -1),
        decay_local=decay,
    )


def _grouped(x: Tensor, y: Tensor) -> Tensor:
    """x [B, KV, nC, G, C, a] @ y [B, KV, nC, a, b], without repeating y for each of the G heads."""
    return (x.flatten(3, 4) @ y).unflatten(3, x.shape[3:5])


def _local(
    chunks: _Chunks, sinks: SinkKeys | None, inputs: Inputs, spec: HybridSpec, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sinks and local keys: numerator [B, KV, nC, G, C, Dv] and denominator [B, KV, nC, G, C]."""
    same_text = None
    if chunks.segment is not None and chunks.segment_local is not None:
        same_text = chunks.segment[..., None] == chunks.segment_local[..., None, :]
    near, far = pair_masks(chunks.position[..., None], chunks.position_local[..., None, :], spec, same_text)
    scores = cap_scores(_grouped(chunks.q * spec.score_scale(chunks.q.shape[-1]), chunks.k_local.mT), spec.softcap)
    scores = scores.masked_fill(_to_pairs(~near), -torch.inf)
    parts = [] if spec.window == 0 else [scores]
    sink_scores = sink_v = learned = None
    if sinks is not None:
        sink_scores, sink_v = _sink_scores(chunks, sinks, spec, dtype)
        parts.append(sink_scores)
    if inputs.sink_logits is not None:
        learned = _to_rows(inputs.sink_logits.to(dtype), chunks).expand(*scores.shape[:-1], 1)
        parts.append(learned)
    top = row_max(parts) if parts else 0.0
    gate = _to_rows(torch.sigmoid(inputs.window_factor.to(dtype)), chunks)
    weights = gate * torch.exp(scores - top)
    weights = _add_linear(weights, chunks, far, spec)
    numerator, denominator = _grouped(weights, chunks.v_local), weights.sum(-1)
    if sink_scores is not None and sink_v is not None:
        sink_weights = gate * torch.exp(sink_scores - top)
        if sink_v.ndim == 4:
            numerator = numerator + _grouped(sink_weights, sink_v[:, :, None])
        else:  # a set of sinks for each token
            numerator = numerator + torch.einsum("bkngcs,bkncsd->bkngcd", sink_weights, sink_v)
        denominator = denominator + sink_weights.sum(-1)
    if learned is not None:
        denominator = denominator + (gate * torch.exp(learned - top)).squeeze(-1)
    return numerator, denominator


def _to_rows(x: Tensor, chunks: _Chunks) -> Tensor:
    """[H] -> [KV, 1, G, 1, 1]."""
    return x.unflatten(0, (chunks.q.shape[1], -1))[:, None, :, None, None]


def _to_pairs(mask: Tensor) -> Tensor:
    """[b, nC, C, K] -> [b, 1, nC, 1, C, K]."""
    return mask[:, None, :, None]


def _sink_scores(chunks: _Chunks, sinks: SinkKeys, spec: HybridSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Masked scores [B, KV, nC, G, C, s] and the sink values, in chunks where each token has its own sinks."""
    k, v = sinks.k.to(dtype), sinks.v.to(dtype)
    q = chunks.q * spec.score_scale(chunks.q.shape[-1])
    if k.ndim == 4:
        scores = _grouped(q, k[:, :, None].mT)
    else:
        pad = (0, 0, 0, 0, 0, q.shape[2] * CHUNK - k.shape[2])
        k, v = (nnf.pad(x, pad).unflatten(2, (-1, CHUNK)) for x in (k, v))
        scores = torch.einsum("bkngcd,bkncsd->bkngcs", q, k)
    visible = sink_mask(chunks.position[..., None], spec.sinks)
    return cap_scores(scores, spec.softcap).masked_fill(_to_pairs(~visible), -torch.inf), v


def _add_linear(weights: Tensor, chunks: _Chunks, far: Tensor, spec: HybridSpec) -> Tensor:
    """Add the weights of the linear pairs among the local keys."""
    # A linear pair is at least `window` apart, so it lies in the first columns.
    columns = min(weights.shape[-1], max(0, weights.shape[-1] - spec.window))
    if columns == 0:
        return weights
    keys = chunks.phi_local[..., :columns, :]
    linear = _grouped(chunks.phi_q, keys.squeeze(3).mT) if keys.shape[3] == 1 else chunks.phi_q @ keys.mT
    mask = _to_pairs(far[..., :columns])
    if chunks.decay_local is not None:
        own = chunks.decay_local[..., -CHUNK:]
        between = own[..., None] - chunks.decay_local[..., None, :columns]
        linear = linear * torch.exp(torch.where(mask, between, 0.0))
    linear = torch.where(mask, linear, 0.0)
    return torch.cat([weights[..., :columns] + linear, weights[..., columns:]], -1)


def _carried(chunks: _Chunks, inputs: Inputs, spec: HybridSpec) -> tuple[Tensor, Tensor]:
    """All keys older than the local ones: numerator [B, KV, nC, G, C, Dv] and denominator [B, KV, nC, G, C]."""
    keys, values = chunks.phi_local[..., -CHUNK:, :], chunks.v_local[..., -CHUNK:, :]
    weight = (chunks.position >= spec.sinks).to(keys.dtype)[:, None, :, None, :]  # [b, 1, nC, 1, C]
    decay = total = None
    if chunks.decay_local is not None:
        start = nnf.pad(chunks.decay_local, (1, 0))[..., -CHUNK - 1, None]
        decay = chunks.decay_local[..., -CHUNK:] - start
        total = decay[..., -1]  # [B, KV, nC, G]
        weight = weight * torch.exp(total[..., None] - decay)
    last_segment = None
    if chunks.segment is not None:
        last_segment = chunks.segment[..., -1]
        weight = weight * (chunks.segment == last_segment[..., None]).to(weight.dtype)[:, None, :, None]
    keys = keys * weight[..., None]
    sums = LinearState((keys.mT.flatten(3, 4) @ values).unflatten(3, keys.mT.shape[3:5]), keys.sum(-2))
    reach = chunks.position_local.shape[-1] // CHUNK - 1
    states = carried_states(sums, total, last_segment, inputs.state, reach + 1)

    phi_q = chunks.phi_q
    if chunks.decay_local is not None:
        phi_q = phi_q * chunks.decay_local[..., -CHUNK:, None].exp()
    if chunks.segment is not None and last_segment is not None:
        before = nnf.pad(last_segment, (reach + 1, 0), value=-1)[:, : last_segment.shape[1]]
        phi_q = phi_q * (chunks.segment == before[..., None]).to(phi_q.dtype)[:, None, :, None, :, None]
    if states.kv.shape[3] == 1:
        numerator = _grouped(phi_q, states.kv.squeeze(3))
        denominator = _grouped(phi_q, states.k_sum.squeeze(3)[..., None])
    else:
        numerator, denominator = phi_q @ states.kv, phi_q @ states.k_sum[..., None]
    return numerator, denominator.squeeze(-1)
