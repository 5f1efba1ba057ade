"""Feature maps phi: R^D -> R^F, F features >= 0, one matrix a head. Parameters and results are float32.

| name     | phi(x)                                              | F  | source                       |
|----------|-----------------------------------------------------|----|------------------------------|
| hedgehog | [softmax(xW), softmax(-xW)], at least 1e-12          | 2f | Hedgehog, arXiv 2402.04347   |
| t2r      | relu(xW + b)                                         | f  | T2R, arXiv 2103.13076        |
| elu      | 1 + elu(x)                                           | D  | Katharopoulos et al., 2020   |
| relu     | relu(x)                                              | D  |                              |
| exp_dim  | [exp(xW - max), exp(min - xW)], max and min over f    | 2f | LoLCATs, arXiv 2410.10254    |

W starts as the identity (its first f columns where f < D, repeated where f > D): at the start a feature is a channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from lolcats.ops.devices import without_autocast
from lolcats.ops.maps import MapWeights, hedgehog, project, t2r


class FeatureMap(nn.Module):
    """Base: maps x [B, h, N, D] to features [B, heads, N, F].

    `heads` is a multiple of h: with a map of its own for each query head, a key head serves `heads / h` maps in turn.

    Args:
        heads: number of maps.
        head_dim: D.
        feature_size: f, columns of each W.
    """

    learned = False

    def __init__(self, heads: int, head_dim: int, feature_size: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.feature_size = heads, head_dim, feature_size

    @property
    def features(self) -> int:
        """F, the size of phi(x)."""
        return self.head_dim

    def forward(self, x: Tensor) -> Tensor:
        """phi(x) in float32 (float64 for float64 x), whatever autocast says."""
        with without_autocast(x.device.type):
            return self.phi(x if x.dtype == torch.float64 else x.float())

    def phi(self, x: Tensor) -> Tensor:
        """The map itself, on float32 or float64 x."""
        raise NotImplementedError


class _Projected(FeatureMap):
    """A feature map with a matrix W [heads, D, f]."""

    learned = True

    def __init__(self, heads: int, head_dim: int, feature_size: int) -> None:
        super().__init__(heads, head_dim, feature_size)
        self.weight = nn.Parameter(torch.empty(heads, head_dim, feature_size, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W = the identity, its columns cut or repeated to f."""
        with torch.no_grad():
            column = torch.arange(self.feature_size, device=self.weight.device) % self.head_dim
            identity = nnf.one_hot(column, self.head_dim).T.to(self.weight.dtype)
            self.weight.copy_(identity.expand_as(self.weight))

    def project(self, x: Tensor) -> Tensor:
        """xW: [B, h, N, D] -> [B, heads, N, f]."""
        return project(x, self.weight)


class Hedgehog(_Projected):
    """[softmax(xW), softmax(-xW)] over the features of a head, clamped below at 1e-12."""

    @property
    def features(self) -> int:
        return 2 * self.feature_size

    def phi(self, x: Tensor) -> Tensor:
        return hedgehog(self.project(x))


class T2R(_Projected):
    """relu(xW + b), a bias for each feature."""

    def __init__(self, heads: int, head_dim: int, feature_size: int) -> None:
        super().__init__(heads, head_dim, feature_size)
        self.bias = nn.Parameter(torch.zeros(heads, feature_size, dtype=torch.float32))

    @property
    def features(self) -> int:
        return self.feature_size

    def phi(self, x: Tensor) -> Tensor:
        return t2r(self.project(x), self.bias)


class ExpDim(_Projected):
    """[exp(xW - max), exp(min - xW)]: exponentials scaled by the largest feature of each token."""

    @property
    def features(self) -> int:
        return 2 * self.feature_size

    def phi(self, x: Tensor) -> Tensor:
        y = self.project(x)
        return torch.cat([(y - y.amax(-1, keepdim=True)).exp(), (y.amin(-1, keepdim=True) - y).exp()], -1)


class Elu(FeatureMap):
    """1 + elu(x); no parameters, so it gives one map per key head."""

    def phi(self, x: Tensor) -> Tensor:
        return 1 + nnf.elu(x)


class Relu(FeatureMap):
    """relu(x); no parameters, so it gives one map per key head."""

    def phi(self, x: Tensor) -> Tensor:
        return x.relu()


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "hedgehog": Hedgehog,
    "t2r": T2R,
    "elu": Elu,
    "relu": Relu,
    "exp_dim": ExpDim,
}


def map_weights(feature_q: FeatureMap, feature_k: FeatureMap, log_scale: Tensor | None) -> MapWeights | None:
    """The two maps as the weights that `hybrid_attention` takes; None where they are not of a kind that it knows.

    None also where the weights are not at hand: accelerate brings offloaded ones only when the module itself is called.
    """
    if any(p.is_meta for module in (feature_q, feature_k) for p in module.parameters()):
        return None
    if isinstance(feature_q, Hedgehog) and isinstance(feature_k, Hedgehog):
        return MapWeights("hedgehog", feature_q.weight, feature_k.weight, log_scale=log_scale)
    if isinstance(feature_q, T2R) and isinstance(feature_k, T2R):
        return MapWeights("t2r", feature_q.weight, feature_k.weight, feature_q.bias, feature_k.bias, log_scale)
    return None


def build_feature_map(name: str, heads: int, head_dim: int, feature_size: int | None = None) -> FeatureMap:
    """A feature map by name.

    Args:
        name: a key of `FEATURE_MAPS`.
        heads: number of maps (query heads, or key heads for one map per key head).
        head_dim: D.
        feature_size: f; None is `head_dim`. Maps without parameters ignore it.

    Raises:
        ValueError: unknown name, or a feature size below 1.
    """
    if name not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}; got {name!r}")
    size = head_dim if feature_size is None else feature_size
    if size < 1:
        raise ValueError(f"feature_size must be at least 1; got {size}")
    return FEATURE_MAPS[name](heads, head_dim, size)
