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


def _shared(x: Tensor, groups: int) -> Tensor:
    """[R, KV, K, d] for each of G query heads: [R KV, G, K, d], without a copy."""
    return x.flatten(0, 1)[:, None].expand(-1, groups, -1, -1)
