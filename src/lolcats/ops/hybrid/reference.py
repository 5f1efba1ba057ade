"""The definition of hybrid attention: quadratic, literal, in float32 or float64. Every faster form answers to it.

For query i with window W(i) (which also holds the sinks), s_ij = scale q_i.k_j, m_i = max over W(i) of s_ij and
g = sigmoid(window_factor), LoLCATs (arXiv 2410.10254, Eq. 6):

    out_i = [ sum_{j in W(i)} g exp(s_ij - m_i) v_j + sum_{j not in W(i)} d_ij phi_q(i).phi_k(j) v_j ]
            / [ the same sums without v_j ],            d_ij = exp(sum of log_decay over j+1 .. i)

m_i is part of the function: the linear terms are not rescaled by it, and gradients flow through it. With a cap (see
scores.py) s_ij is capped; a learned sink is one more column s_i, in m_i and in the denominator, without a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats.ops.hybrid.layout import Extended, Inputs, extend, final_state, pair_masks, sink_mask
from lolcats.ops.hybrid.scores import cap_scores, row_max
from lolcats.ops.types import HybridOutput, HybridSpec, accumulation_dtype


def reference_attention(inputs: Inputs, spec: HybridSpec, return_state: bool) -> HybridOutput:
    """Quadratic hybrid attention; arguments as checked by `hybrid_attention`."""
    dtype = accumulation_dtype(inputs.q, inputs.v)
    ext = extend(inputs, spec)
    heads = inputs.q.shape[1]
    q, phi_q = inputs.q.to(dtype), inputs.phi_q.to(dtype)
    k, v, phi_k = (_to_heads(x.to(dtype), heads) for x in (ext.k, ext.v, ext.phi_k))
    query_position = ext.position[:, ext.ring :]

    same_text = None if ext.segment is None else ext.segment[:, None, :, None] == ext.segment[:, None, None, :]
    near, far = pair_masks(query_position[:, None, :, None], ext.position[:, None, None, :], spec, same_text)
    scores = cap_scores(q @ k.mT * spec.score_scale(q.shape[-1]), spec.softcap).masked_fill(~near, -torch.inf)
    sink_scores, learned = scores[..., :0], scores[..., :0]
    if ext.sinks is not None:
        visible = sink_mask(query_position[..., None], spec.sinks)[:, None]  # [b, 1, N, s]
        sink_scores = cap_scores(_sink_scores(q, ext, dtype, heads) * spec.score_scale(q.shape[-1]), spec.softcap)
        sink_scores = sink_scores.masked_fill(~visible, -torch.inf)
    if inputs.sink_logits is not None:
        learned = inputs.sink_logits.to(dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    gate = torch.sigmoid(inputs.window_factor.to(dtype))[:, None, None]
    columns = [sink_scores, scores, learned]
    scores = torch.cat(columns, -1)
    weights = gate * torch.exp(scores - row_max([scores]))
    sink_weights, local_weights, learned_weights = weights.split([x.shape[-1] for x in columns], -1)

    linear = phi_q @ phi_k.mT
    total = None
    if ext.log_decay is not None:
        total = ext.log_decay.to(dtype).cumsum(-1)
        between = total[:, :, ext.ring :, None] - total[:, :, None, :]
        linear = linear * torch.exp(between.masked_fill(~far, 0.0))
    local_weights = local_weights + linear.masked_fill(~far, 0.0)

    numerator = local_weights @ v
    denominator = local_weights.sum(-1) + learned_weights.sum(-1)
    if ext.sinks is not None:
        sink_v = _to_heads(ext.sinks.v.to(dtype), heads)
        equation = "bhns,bhnsd->bhnd" if ext.segment is not None else "bhns,bhsd->bhnd"
        numerator = numerator + torch.einsum(equation, sink_weights, sink_v)
        denominator = denominator + sink_weights.sum(-1)
    if inputs.state is not None:
        kv, k_sum = (_to_heads(x.to(dtype), heads) for x in inputs.state.linear)
        old = phi_q if total is None else phi_q * total[:, :, ext.ring :, None].exp()
        numerator = numerator + old @ kv
        denominator = denominator + (old @ k_sum[..., None]).squeeze(-1)
    out = divide(numerator, denominator, query_position)
    state = final_state(inputs, ext, spec, dtype) if return_state else None
    return HybridOutput(out.to(inputs.v.dtype), state)


def divide(numerator: Tensor, denominator: Tensor, query_position: Tensor) -> Tensor:
    """numerator / denominator; zero where a query sees nothing (an empty sum) and at padding."""
    seen = (denominator != 0) & (query_position[:, None] >= 0)  # NaN counts as seen: it must not be hidden
    out = numerator / torch.where(seen, denominator, 1.0)[..., None]
    return torch.where(seen[..., None], out, 0.0)


def _sink_scores(q: Tensor, ext: Extended, dtype: torch.dtype, heads: int) -> Tensor:
    """Unscaled scores of the sinks: [B, H, N, s]."""
    assert ext.sinks is not None
    sink_k = _to_heads(ext.sinks.k.to(dtype), heads)
    equation = "bhnd,bhnsd->bhns" if ext.segment is not None else "bhnd,bhsd->bhns"
    return torch.einsum(equation, q, sink_k)


def _to_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat key/value heads to query heads: [B, KV, ...] -> [B, H, ...]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
