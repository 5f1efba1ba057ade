"""Scores of the softmax half: capping, learned sinks and the row maximum, shared by all implementations.

A learned sink (gpt-oss's `s_aux`) is one more column of scores, the same at every query: it takes part in the row
maximum and adds g exp(logit - maximum) to the shared denominator, and it has no value.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def cap_scores(scores: Tensor, softcap: float | None) -> Tensor:
    """softcap tanh(scores / softcap), which stays within +-softcap (Gemma 2); `scores` themselves without a cap."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def row_max(parts: list[Tensor]) -> Tensor:
    """Largest finite score of each row over all parts [..., k_i], 0 for rows that see nothing: [..., 1].

    The gradient is that of `amax` over the concatenation, which is not made: tied scores share it equally.
    """
    top = parts[0].amax(-1, keepdim=True) if len(parts) == 1 else _joint_max(*parts)
    return torch.where(torch.isinf(top), 0.0, top)


class _JointMax(torch.autograd.Function):
    """Row maximum over several tensors."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, third: Tensor | None = None) -> Tensor:
        # No *parts: with two of them torch's compiler takes `ctx` for one more argument and drops it.
        parts = [part for part in (first, second, third) if part is not None]
        top = functools.reduce(torch.maximum, [part.amax(-1, keepdim=True) for part in parts])
        ctx.save_for_backward(top, *parts)
        return top

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        top, *parts = ctx.saved_tensors
        largest = [part == top for part in parts]
        share = grad_outputs[0] / torch.stack([x.sum(-1, keepdim=True) for x in largest]).sum(0)
        return tuple(x * share for x in largest)


def _joint_max(*parts: Tensor) -> Tensor:
    top = _JointMax.apply(*parts)
    assert isinstance(top, Tensor)
    return top
