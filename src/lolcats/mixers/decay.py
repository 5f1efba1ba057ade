"""Decays of a state: a factor for each token and head, or channel, whose logarithm is -softplus(w.x + b).

x is the layer's input. At the start w = 0, and the time constants are spread over `SHORTEST` to `LONGEST` tokens, so
that a layer has both a short and a long memory.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from lolcats.ops.devices import without_autocast

SHORTEST, LONGEST = 64.0, 8192.0
"""Time constants in tokens."""


class Decay(nn.Module):
    """Log of the decay of each head at each token.

    Args:
        heads: number of decays.
        hidden_size: d_model.
        reads: whether it depends on the layer's input; else it is one number a head.
    """

    def __init__(self, heads: int, hidden_size: int, reads: bool) -> None:
        super().__init__()
        constants = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), heads, dtype=torch.float32)
        self.bias = nn.Parameter(torch.log(torch.expm1(1 / constants)))
        self.weight = nn.Parameter(torch.zeros(heads, hidden_size, dtype=torch.float32)) if reads else None

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, N, d_model] -> [B, heads, N], below 0."""
        with without_autocast(hidden.device.type):
            if self.weight is None:
                return -nnf.softplus(self.bias)[None, :, None].expand(len(hidden), -1, hidden.shape[1])
            return -nnf.softplus(nnf.linear(hidden.to(self.weight.dtype), self.weight, self.bias)).transpose(1, 2)
