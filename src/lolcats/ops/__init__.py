"""Functions of tensors only: no configuration, no transformers."""

from lolcats.ops.hybrid import IMPLEMENTATIONS, hybrid_attention, resolve_impl
from lolcats.ops.types import HybridOutput, HybridState, LinearState, SinkKeys, WindowRing

__all__ = [
    "IMPLEMENTATIONS",
    "HybridOutput",
    "HybridState",
    "LinearState",
    "SinkKeys",
    "WindowRing",
    "hybrid_attention",
    "resolve_impl",
]
