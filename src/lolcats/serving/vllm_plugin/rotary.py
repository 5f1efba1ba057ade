"""The rotary embedding of vLLM's families as the mixers know it (`lolcats.mixers.rotation`)."""

# pyright: reportMissingImports=false
# vLLM is not installed where the rest of the package is checked.

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lolcats.errors import LolcatsError
from lolcats.mixers import Reach, Rotation
from lolcats.mixers.rotation import Layout

CACHE = "cos_sin_cache"
"""What all of vLLM's rotary modules have: [positions, R] cosines and sines of R / 2 pairs."""
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Relative: what rounding does."""
UNROTATED = Layout("none")


def extend_rotaries(model: nn.Module, tokens: int) -> None:
    """Have the rotary modules of a model know positions up to `tokens`, where they know fewer.

    Raises:
        LolcatsError: there are none, or one whose angles depend on how many positions it knows.
    """
    rotaries = [module for module in model.modules() if isinstance(getattr(module, CACHE, None), Tensor)]
    if not rotaries:
        raise LolcatsError(
            f"{type(model).__name__} cannot read texts of {tokens:,} tokens: its positions end with its context; set "
            "max_model_len to that"
        )
    for rotary in rotaries:
        known = cast(Tensor, getattr(rotary, CACHE))
        if len(known) < tokens:
            setattr(rotary, CACHE, _longer(rotary, known, tokens))


@torch.no_grad()
def _longer(rotary: Any, known: Tensor, tokens: int) -> Tensor:
    rotary.max_position_embeddings = tokens
    longer = rotary._compute_cos_sin_cache().to(known)
    if len(longer) < tokens or not torch.allclose(longer[: len(known)], known):
        raise LolcatsError(
            f"{type(rotary).__name__} has other angles in longer texts; set max_model_len to the model's context"
        )
    return longer


def reach_of(rotary: nn.Module, limit: int) -> Reach:
    """What mixers are told of a model's context of `limit` tokens."""
    cache = cast(Tensor, getattr(rotary, CACHE))
    return Reach(limit, rotation_at(rotary, torch.tensor([[limit - 1]], device=cache.device), cache))


def rotary_of(attention: nn.Module) -> nn.Module | None:
    """The rotary module inside a family's attention module."""
    return next((m for m in attention.modules() if isinstance(getattr(m, CACHE, None), Tensor)), None)


def layout_of(rotary: nn.Module) -> Layout:
    """Which channels it turns."""
    return Layout("half" if rotary.is_neox_style else "interleaved", "first", "single")


def rotation_at(rotary: nn.Module | None, positions: Tensor | None, hidden: Tensor) -> Rotation:
    """The rotation of tokens at `positions` [B, N]; none where the family did not rotate them."""
    if rotary is None or positions is None:
        plain = hidden.new_zeros(1, 1, 0)
        return Rotation(plain, plain, UNROTATED)
    cache = cast(Tensor, getattr(rotary, CACHE))
    cos, sin = cache[positions].chunk(2, -1)
    return Rotation(cos, sin, layout_of(rotary))


@torch.no_grad()
def check_rotary(rotary: nn.Module, name: str, head_dim: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Raise LolcatsError unless the module does to queries and keys what `rotation_at` says."""
    cache = cast(Tensor, getattr(rotary, CACHE))
    last = len(cache) - 1
    positions = torch.tensor([0, 1, last // 3, last // 2, last], device=cache.device)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(5, kv_heads * head_dim, generator=generator).to(cache.device, dtype) for _ in range(2))
    rotation = rotation_at(rotary, positions[None], q)
    try:
        rotated = rotary(positions, q.clone(), k.clone())
        errors = [_error(rotation, x, y, head_dim) for x, y in zip(rotated, (q, k), strict=True)]
    except (RuntimeError, TypeError, ValueError) as error:
        raise LolcatsError(f"{_refusal(rotary, name)} it fails: {error}") from error
    if not max(errors) <= TOLERANCES[dtype]:
        raise LolcatsError(f"{_refusal(rotary, name)} it is off by {max(errors):.2g} (relative)")


def _error(rotation: Rotation, rotated: Tensor, before: Tensor, head_dim: int) -> float:
    x, y = (t.view(1, len(t), -1, head_dim).transpose(1, 2) for t in (rotated, before))
    return float((rotation.undo(x).float() - y.float()).norm() / y.float().norm())


def _refusal(rotary: nn.Module, name: str) -> str:
    return (
        f"{name} rotates by {type(rotary).__name__}, which this mixer would have to undo: expected pairs of the first "
        "channels turned by angles of the position alone;"
    )
