"""Rounding of sums to bfloat16 that does not lose what is small.

Rounding to nearest would stop a sum: with 8 bits of precision, a decay of less than 1/512 per token and terms of less
than 1/512 of the sum change nothing. So a number is rounded up or down with the probabilities that make the mean right.
What stands for chance is a hash of the number's own bits, so that a result depends on nothing else: not on other rows,
nor on the state of a random generator.

What is left is noise: of a sum that is rounded at every token and has a time constant of T tokens, a relative error of
about sqrt(T) / 1000, a few percent at 4,096; of one that is rounded once for each part of a text, less.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (-1640531527, 2146121005, -2073254261)
"""Odd numbers as 32-bit integers: that of the golden ratio (Knuth), and two of a hash of low bias (C. Wellons)."""


def to_bfloat16(x: Tensor) -> Tensor:
    """A float32 tensor in bfloat16, each number rounded to one of its two neighbours, the nearer one more often."""
    bits = x.contiguous().view(torch.int32)
    mixed = bits * _MULTIPLIERS[0]
    for multiplier in _MULTIPLIERS[1:]:
        mixed = (mixed ^ (mixed >> 15)) * multiplier
    chance = (mixed >> 16) & 0xFFFF
    return ((bits + chance) & -0x10000).view(torch.float32).to(torch.bfloat16)
