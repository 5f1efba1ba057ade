"""Which way one decoding step is made: by the kernel, in place, or in plain torch (`recurrent.hybrid_step`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lolcats.ops.hybrid.api import kernels_available
from lolcats.ops.hybrid.layout import Settings
from lolcats.ops.maps import MapWeights


def fused_step(q: Tensor, v: Tensor, maps: MapWeights | None, settings: Settings) -> Callable[..., Any] | None:
    """The kernel's step for q [B, H, 1, D] and v [B, KV, 1, Dv], or None where it cannot run.

    That is without a GPU, where gradients are wanted, under torch.compile, and for windows and sizes that it does not
    take (`kernels.decode.can_step`).
    """
    if maps is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or not kernels_available(q.device):
        return None
    # Not at the top: Triton is a requirement neither of this package nor of the code that `lolcats export` writes.
    from lolcats.ops.hybrid.kernels.decode import can_step, decode_step

    return decode_step if can_step(q, v, maps, settings) else None
