"""Whether a kernel gives what a module gives, number by number, up to roundings."""

from __future__ import annotations

import torch
from torch import Tensor


def random_numbers(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Normal numbers that disturb no generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def rounding(dtype: torch.dtype) -> float:
    """Relative: what rounding a number to a format may change, after a few roundings in float32."""
    return torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps


def agree(got: Tensor, want: Tensor, roundings: int, lost: Tensor | float = 0.0) -> bool:
    """Whether two tensors have one form, and numbers that differ at most by some roundings and what is `lost`."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    limit = roundings * rounding(want.dtype) * want.double().abs() + lost + torch.finfo(want.dtype).smallest_normal
    return bool(((got.double() - want.double()).abs() <= limit).all())
