"""Softmax attention over the keys that a mask shows: what blocks and steps have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lolcats.ops.hybrid.scores import cap_scores
from lolcats.ops.near.types import NearSpec
from lolcats.ops.types import accumulation_dtype


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: NearSpec, sink_logits: Tensor | None) -> Tensor:
    """Softmax attention of rows.

    Args:
        q: [R, KV, G, C, D], G query heads of each key head; k: [R, KV, K, D]; v: [R, KV, K, Dv].
        mask: [R, KV, C, K] bool, at least one key for each query.
        spec: how scores are made.
        sink_logits: [KV, G] or None.

    Returns:
        [R, KV, G, C, Dv] in the dtype of v.
    """
    rows, kv_heads, groups, count, size = q.shape
    mask = mask[:, :, None]
    if spec.softcap is None and sink_logits is None:
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a rotary embedding leaves them in float32
        out = nnf.scaled_dot_product_attention(
            q.flatten(0, 1), _shared(k, groups), _shared(v, groups), mask.flatten(0, 1), scale=spec.product_scale(size)
        )
        return out.view(rows, kv_heads, groups, count, -1)
    dtype = accumulation_dtype(q, v)
    products = q.to(dtype) @ k[:, :, None].to(dtype).mT * spec.product_scale(size)
    products = cap_scores(products, spec.softcap).masked_fill(~mask, -torch.inf)
    if sink_logits is not None:
        column = sink_logits.to(dtype)[..., None, None].expand(*products.shape[:-1], 1)
        products = torch.cat([products, column], -1)
    weights = products.softmax(-1)[..., : k.shape[2]]
    return (weights @ v[:, :, None].to(dtype)).to(v.dtype)


def with_sink_queries(
    q: Tensor, sink_q: Tensor | None, keys: list[Tensor], sinks: int | None
) -> tuple[Tensor, list[Tensor]]:
    """Queries and keys of twice the size, whose products are those of `sink_q` with sinks and of q with the others.

    Args:
        q: [..., D]; sink_q: the same shape, or None: all are as they were.
        keys: parts [..., K, D] of the keys.
        sinks: which part is the sinks; None where there are none.
    """
    if sink_q is None or sinks is None:
        return q, keys
    doubled = [
        torch.cat([torch.zeros_like(part), part] if number == sinks else [part, torch.zeros_like(part)], -1)
        for number, part in enumerate(keys)
    ]
    return torch.cat([q, sink_q], -1), doubled


def _shared(x: Tensor, groups: int) -> Tensor:
    """[R, KV, K, d] for each of G query heads: [R KV, G, K, d], without a copy."""
    return x.flatten(0, 1)[:, None].expand(-1, groups, -1, -1)
