"""Feature maps as functions of tensors, and the weights of a layer's two maps. `lolcats.feature_maps` has the table."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MapWeights(NamedTuple):
    """The learned maps of a layer's queries and keys."""

    kind: str
    """"hedgehog" (F = 2 f features) or "t2r" (F = f)."""
    q: Tensor
    """[H, D, f]: one matrix W per query head."""
    k: Tensor
    """[H or KV, D, f]."""
    bias_q: Tensor | None = None
    """[H, f], t2r only."""
    bias_k: Tensor | None = None
    """[H or KV, f], t2r only."""
    log_scale: Tensor | None = None
    """[H]: the features of the queries are multiplied by exp(log_scale)."""

    def phi_q(self, q: Tensor) -> Tensor:
        """Features of the queries: [B, H, N, D] -> [B, H, N, F], float32 (float64 for float64)."""
        phi = map_features(self.kind, q, self.q, self.bias_q)
        return phi if self.log_scale is None else phi * self.log_scale.to(phi.dtype).exp()[:, None, None]

    def phi_k(self, k: Tensor) -> Tensor:
        """Features of the keys: [B, KV, N, D] -> [B, H or KV, N, F], float32 (float64 for float64)."""
        return map_features(self.kind, k, self.k, self.bias_k)


def map_features(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """phi(x) of x [B, h, N, D] with weight [heads, D, f]; head j of x serves maps j heads/h .. (j + 1) heads/h - 1.

    Raises:
        ValueError: `kind` is not "hedgehog" or "t2r".
    """
    x = x if x.dtype == torch.float64 else x.float()
    y = project(x, weight)
    if kind == "hedgehog":
        return hedgehog(y)
    if kind == "t2r":
        return t2r(y, bias)
    raise ValueError(f"expected a feature map 'hedgehog' or 't2r'; got {kind!r}")


def project(x: Tensor, weight: Tensor) -> Tensor:
    """xW: [B, h, N, D] and [heads, D, f] -> [B, heads, N, f]."""
    return (x[:, :, None] @ weight.to(x.dtype).unflatten(0, (x.shape[1], -1))).flatten(1, 2)


def hedgehog(y: Tensor) -> Tensor:
    """[softmax(y), softmax(-y)], at least 1e-12 (Hedgehog, arXiv 2402.04347)."""
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(1e-12)


def t2r(y: Tensor, bias: Tensor | None) -> Tensor:
    """relu(y + b), b [heads, f] (T2R, arXiv 2103.13076)."""
    return (y if bias is None else y + bias[:, None].to(y.dtype)).relu()
