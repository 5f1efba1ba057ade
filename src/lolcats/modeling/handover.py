"""What passes between a wrapped attention module and its `LinearizedAttention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from lolcats.mixers import Call, Reach, Rotation
from lolcats.modeling.cache import Past


@dataclass
class AttentionCall(Call):
    """What arrives at the attention interface, with what softmax attention needs to know besides."""

    mask: Tensor | None = None
    """As the model made it."""
    seen: int | Tensor = 0
    """Column of the first new token in the mask."""


@dataclass
class Handover:
    """What a wrapper passes through its family's forward. No tuple: accelerate's hooks would move its parts about."""

    layer: Any
    """The `LinearizedAttention` that started the call."""
    hidden: Tensor
    cache: Cache | None
    """None where the family itself keeps keys and values (mode "softmax")."""
    past: Past
    """What the cache held before this call."""
    rotary: Any
    """The family's rotary embeddings: one object a forward pass."""
    backend: str
    """Name of the attention implementation of the layers that keep softmax attention; our own where there are none."""
    rotation: Rotation | None = None
    """How q and k are rotated, for mixers that need to know."""
    reach: Reach | None = None
    """How far the model was made to look back, likewise."""
