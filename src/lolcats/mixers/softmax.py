"""Exact softmax attention with what SDPA lacks: capped scores (Gemma 2) and learned sinks (gpt-oss)."""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats.mixers.base import Call
from lolcats.ops.hybrid.scores import cap_scores

QUERY_BLOCK = 256
"""Queries whose scores are in memory at once."""


def softmax_with_sinks(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Softmax of scores [..., H, N, K] with a learned sink a head [H] in the denominator; in float32."""
    if sink_logits is None:
        return scores.softmax(-1, dtype=torch.float32)
    column = sink_logits[:, None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1, dtype=torch.float32)[..., :-1]


def softmax_weights(call: Call) -> Tensor:
    """Attention weights [B, H, N, N] of the softmax over a text, float32; packed texts are kept apart."""
    n = call.q.shape[2]
    causal = torch.ones(n, n, dtype=torch.bool, device=call.q.device).tril()[None, None]
    if call.segments is not None:
        causal = causal & (call.segments[:, None, :, None] == call.segments[:, None, None, :])
    keys = call.k.float().repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
    scores = cap_scores(call.q.float() @ keys.mT * call.scale, call.softcap).masked_fill(~causal, -torch.inf)
    return softmax_with_sinks(scores, call.sink_logits)


def capped_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Softmax attention of the last N of K tokens: [B, H, N, Dv], in the dtype of v.

    Args:
        q: [B, H, N, D]; k: [B, KV, K, D]; v: [B, KV, K, Dv].
        mask: [B or 1, 1, N, K], bool (True is visible) or additive; None is causal.
        scale: of the scores; softcap: their cap; sink_logits: [H].
    """
    n, keys = q.shape[2], k.shape[2]
    if mask is None:
        mask = torch.ones(n, keys, dtype=torch.bool, device=q.device).tril(keys - n)[None, None]
    outputs = []
    for queries, visible in zip(q.split(QUERY_BLOCK, 2), mask.split(QUERY_BLOCK, 2), strict=True):
        grouped = queries.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, KV, G n, D]
        scores = (grouped @ k.mT).view(*queries.shape[:3], keys)
        scores = cap_scores(scores * scale, softcap)
        if visible.dtype == torch.bool:
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        else:
            scores = scores + visible
        weights = softmax_with_sinks(scores, sink_logits).to(v.dtype)
        out = weights.unflatten(1, (v.shape[1], -1)).flatten(2, 3) @ v
        outputs.append(out.view(*queries.shape[:3], v.shape[3]))
    return torch.cat(outputs, 2)
