"""Softmax attention over sinks, a window and kept pairs."""

from lolcats.ops.near.api import near_attention, near_attentions
from lolcats.ops.near.blocks import empty_near_state, kept_until
from lolcats.ops.near.step import near_step, near_steps
from lolcats.ops.near.types import KeptPairs, NearOutput, NearPart, NearRing, NearSpec, NearState

__all__ = [
    "KeptPairs",
    "NearOutput",
    "NearPart",
    "NearRing",
    "NearSpec",
    "NearState",
    "empty_near_state",
    "kept_until",
    "near_attention",
    "near_attentions",
    "near_step",
    "near_steps",
]
