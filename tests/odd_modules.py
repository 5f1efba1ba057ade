"""Norms and MLPs that are named as those of families are, and compute something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class CenteredRMSNorm(nn.Module):
    """One that takes the mean away first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.linspace(0.5, 2, 12)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class NarrowRMSNorm(CenteredRMSNorm):
    """A root that is bounded: what only small rows show."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x.pow(2).mean(-1, keepdim=True) + self.eps).clamp_min(1e-4)) * self.weight


class TwoRMSNorm(CenteredRMSNorm):
    """One that is told how many rows there are."""

    def forward(self, x: Tensor, rows: int) -> Tensor:  # type: ignore[override]
        return super().forward(x)[:rows]


class Gated(nn.Module):
    """The MLP of most families; the others do a little more."""

    def __init__(self, act_fn: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)
        self.act_fn = nn.SiLU() if act_fn is None else act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Clamped(Gated):
    """As in gpt-oss and its like: what is small is not changed."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).clamp(max=7), self.up_proj(x).clamp(-7, 7)
        return self.down_proj(self.act_fn(gate) * up)


class Scaled(Gated):
    """With a multiplier."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.01 * super().forward(x)


class Normed(Gated):
    """With a norm before the last product."""

    def forward(self, x: Tensor) -> Tensor:
        product = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(product / product.norm(dim=-1, keepdim=True))


class Swapped(Gated):
    """With the activation on the other side."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Zero(Gated):
    """Which tells nothing of its activation."""

    def __init__(self) -> None:
        super().__init__()
        for p in self.parameters():
            p.zero_()


class FickleRMSNorm(nn.Module):
    """A norm that is another one for so many tokens, which random rows do not show."""

    def __init__(self, own: Any, tokens: int = 1) -> None:
        super().__init__()
        self.tokens = tokens
        self.weight, self.eps = own.weight, own.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return normed.flip(-1) if x.shape[1] == self.tokens else normed


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "centered": CenteredRMSNorm, "narrow": NarrowRMSNorm, "clamped": Clamped, "scaled": Scaled, "normed": Normed,
    "swapped": Swapped, "zero": Zero, "relu": lambda: Gated(nn.ReLU()), "gelu": lambda: Gated(nn.GELU()),
    "no weight": lambda: nn.RMSNorm(12, 1e-6, elementwise_affine=False),
}  # fmt: skip
