"""How families' RMS norms and gated MLPs differ."""

from __future__ import annotations

import itertools
from typing import NamedTuple

ACTIVATIONS = ("silu", "gelu_tanh")
"""Of the gate: x sigmoid(x), and torch's gelu by tanh."""


class NormForm(NamedTuple):
    """What comes after a row x [D] was divided by the root of its mean square, in float32: its factor w [D]."""

    adds_one: bool
    """The factor is 1 + w."""
    rounds_first: bool
    """The row is rounded to the dtype of x before it is multiplied; else the product is."""


NORM_FORMS = tuple(NormForm(*flags) for flags in itertools.product((False, True), repeat=2))
