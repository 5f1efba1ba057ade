"""Which way one decoding step is made: by the kernel, in place, or in plain torch (`recurrent.hybrid_step`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lolcats.ops.hybrid.api import kernels_available
from lolcats.ops.maps import MapWeights
from lolcats.ops.types import HybridSpec


def fused_step(
    q: Tensor, v: Tensor, maps: MapWeights | None, spec: HybridSpec, impl: str = "auto", needs_grad: bool = True
) -> Callable[..., Any] | None:
    """The kernel's step for q [B, H, 1, D] and v [B, KV, 1, Dv], or None for the step in torch.

    Args:
        maps: weights of the feature maps; None where they are not of a kind that the kernel makes itself.
        impl: "triton" is the kernel; "auto" is the kernel on a GPU where it can run, in code that keeps no gradients;
            every other name is the step in torch.
        needs_grad: whether gradients are wanted where they are enabled.

    Raises:
        ValueError: `impl` is "triton" and the kernel cannot run the step; the message says why.
    """
    if impl not in ("auto", "triton"):
        return None
    if impl == "auto" and (torch.is_grad_enabled() or not kernels_available(q.device)):
        return None
    reason = _refusal(q, v, maps, spec, needs_grad)
    if reason is None:
        from lolcats.ops.hybrid.kernels.decode import decode_step

        return decode_step
    if impl == "triton":
        raise ValueError(f"impl 'triton' cannot run this decoding step: {reason}; use impl 'auto'")
    return None


def _refusal(q: Tensor, v: Tensor, maps: MapWeights | None, spec: HybridSpec, needs_grad: bool) -> str | None:
    """Why the kernel cannot run a step, or None."""
    if not kernels_available(q.device) and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA device of compute capability 8.0 or later; the tensors are on {q.device}"
    if torch.compiler.is_compiling():
        return "it does not run under torch.compile"
    if torch.is_grad_enabled() and needs_grad:
        return "it gives no gradients; decode under torch.no_grad()"
    if maps is None:
        return "it makes the features of 'hedgehog' and 't2r' only, from weights at hand, and not in mode window_only"
    # Not at the top: Triton is a requirement neither of this package nor of the code that `lolcats export` writes.
    from lolcats.ops.hybrid.kernels.decode import step_refusal

    return step_refusal(q, v, maps, spec)
