"""What passes between a wrapped attention module and its `LinearizedAttention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from lolcats.modeling.cache import Past
from lolcats.modeling.masks import TokenFacts


@dataclass
class AttentionCall:
    """What arrives at the attention interface: q [B, H, N, D], k and v [B, KV, N, .], after norms and RoPE."""

    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor
    """[B, N, d_model], the input of the attention module."""
    mask: Tensor | None
    facts: TokenFacts
    scale: float
    softcap: float | None = None
    """Cap of the scores (Gemma 2)."""
    sink_logits: Tensor | None = None
    """[H], learned sinks (gpt-oss)."""
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
