"""Whether kernels give what modules give: one, number by number up to roundings; all of a model, in its logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lolcats.modeling.head import relative_error, tolerance


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


def check_agree(what: str, got: Sequence[Tensor], expected: Sequence[Tensor], factor: float = 1.0) -> None:
    """Refuse logits [..., V] that differ by more than a few roundings of a whole model.

    Args:
        what: has given them, for the message.
        got, expected: of steps, in order.
        factor: how many times `tolerance` they may differ.

    Raises:
        RuntimeError: they differ by more, or one is not a number.
    """
    for one, want in zip(got, expected, strict=True):
        if not (error := relative_error(one, want)) <= factor * tolerance(want.dtype):
            raise RuntimeError(f"{what} is off by {error:.2g} of its logits")
