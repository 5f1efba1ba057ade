"""Functions of tensors only: no configuration, no transformers."""

from lolcats.ops.hybrid import IMPLEMENTATIONS, hybrid_attention, kernels_available, mapped_attention, resolve_impl
from lolcats.ops.maps import MapWeights
from lolcats.ops.types import HybridOutput, HybridState, LinearState, SinkKeys, WindowRing

__all__ = [
    "IMPLEMENTATIONS",
    "HybridOutput",
    "HybridState",
    "LinearState",
    "MapWeights",
    "SinkKeys",
    "WindowRing",
    "hybrid_attention",
    "kernels_available",
    "mapped_attention",
    "resolve_impl",
]
