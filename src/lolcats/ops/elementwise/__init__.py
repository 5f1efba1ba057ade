"""What a layer does to rows and to single numbers, in one kernel each: RMS norms, the gated product of an MLP, rotary
embedding."""

from lolcats.ops.elementwise.api import DTYPES, gated_product, kernels_refuse, rms_norm, turn_halves
from lolcats.ops.elementwise.types import ACTIVATIONS, NORM_FORMS, NormForm

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "NORM_FORMS",
    "NormForm",
    "gated_product",
    "kernels_refuse",
    "rms_norm",
    "turn_halves",
]
