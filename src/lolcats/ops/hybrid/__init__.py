"""Hybrid attention: softmax over a window (and sinks), a learned linear attention over the rest, one denominator."""

from lolcats.ops.hybrid.api import IMPLEMENTATIONS, hybrid_attention, kernels_available, resolve_impl
from lolcats.ops.hybrid.recurrent import leaving_keys
from lolcats.ops.hybrid.step import hybrid_step

__all__ = [
    "IMPLEMENTATIONS",
    "hybrid_attention",
    "hybrid_step",
    "kernels_available",
    "leaving_keys",
    "resolve_impl",
]
