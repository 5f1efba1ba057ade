"""Functions of tensors only: no configuration, no transformers."""

from lolcats.ops.hybrid import (
    IMPLEMENTATIONS,
    hybrid_attention,
    hybrid_step,
    kernels_available,
    leaving_keys,
    resolve_impl,
)
from lolcats.ops.maps import MapWeights
from lolcats.ops.recurrence import (
    RECURRENCE_IMPLEMENTATIONS,
    RecurrenceOutput,
    RecurrentState,
    recurrence,
    recurrence_step,
    resolve_recurrence,
)
from lolcats.ops.types import HybridOutput, HybridSpec, HybridState, LinearState, SinkKeys, WindowRing

__all__ = [
    "IMPLEMENTATIONS",
    "RECURRENCE_IMPLEMENTATIONS",
    "HybridOutput",
    "HybridSpec",
    "HybridState",
    "LinearState",
    "MapWeights",
    "RecurrenceOutput",
    "RecurrentState",
    "SinkKeys",
    "WindowRing",
    "hybrid_attention",
    "hybrid_step",
    "kernels_available",
    "leaving_keys",
    "recurrence",
    "recurrence_step",
    "resolve_impl",
    "resolve_recurrence",
]
