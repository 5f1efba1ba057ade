"""Exact softmax attention with what SDPA lacks: capped scores (Gemma 2) and learned sinks (gpt-oss)."""

from __future__ import annotations

from collections.abc import Iterator

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


def attention_blocks(call: Call, block: int, dtype: torch.dtype | None = None) -> Iterator[tuple[int, Tensor]]:
    """The weights of the softmax over a text in each row, for `block` queries after the other.

    Args:
        call: whole texts; padding on the right only, if at all.
        block: queries whose weights are in memory at once.
        dtype: of the products; None is that of q and k.

    Yields:
        The first query of a block, and its weights [B, H, C, K] float32 for the K keys up to its last query.
    """
    q, k = (x if dtype is None else x.to(dtype) for x in (call.q, call.k))
    keys = torch.arange(q.shape[2], device=q.device)
    for begin in range(0, q.shape[2], block):
        queries = keys[begin : begin + block, None]
        end = begin + len(queries)
        grouped = q[:, :, begin:end].unflatten(1, (k.shape[1], -1)).flatten(2, 3)
        scores = cap_scores((grouped @ k[:, :, :end].mT).float() * call.scale, call.softcap)
        scores = scores.view(len(q), q.shape[1], end - begin, end).masked_fill(keys[:end] > queries, -torch.inf)
        yield begin, softmax_with_sinks(scores, call.sink_logits)


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
