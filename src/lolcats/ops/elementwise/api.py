"""Checks arguments, and calls the kernels."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lolcats.ops.devices import capability
from lolcats.ops.elementwise.types import ACTIVATIONS, NormForm
from lolcats.ops.hybrid.checks import expect

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST = 16_384
"""Numbers of a row: a program holds one."""


def kernels_refuse(device: torch.device) -> str | None:
    """Why the kernels do not run on a device, or None. On a CPU they do in Triton's interpreter alone."""
    if _launch() is None:
        return "they need the package triton, which is not installed here"
    if device.type != "cuda":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else f"they need a CUDA device; got {device}"
    if capability(device) < (8, 0):
        return "they need compute capability 8.0 or later"
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: NormForm) -> Tensor:
    """Each row divided by the root of its mean square, times a factor. No gradients.

    Args:
        x: [..., D] bfloat16, float16 or float32; D is at most 16,384.
        weight: [D], one of these dtypes.
        eps: added to the mean square.
        form: what the factor is, and where it is rounded.

    Returns:
        [..., D], in the dtype of x, or, where that is rounded first, in the dtype of its product with the weight.

    Raises:
        ValueError: another shape or dtype, or the kernels do not run on this device.
    """
    expect(x.ndim >= 1 and 1 <= x.shape[-1] <= LARGEST, f"rows of 1 to {LARGEST} numbers", tuple(x.shape))
    expect(weight.shape == x.shape[-1:], f"a weight ({x.shape[-1]},)", tuple(weight.shape))
    _check(x, weight)
    return _kernels(x).rms_norm(x, weight, eps, form)


def gated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The activation of the gate, rounded to its dtype, times `up`. No gradients.

    Args:
        gate, up: of one shape and dtype: bfloat16, float16 or float32.
        activation: one of `ACTIVATIONS`.

    Returns:
        What both are.

    Raises:
        ValueError: another shape, dtype or name, or the kernels do not run on this device.
    """
    expect(activation in ACTIVATIONS, f"an activation of {', '.join(ACTIVATIONS)}", activation)
    expect(gate.shape == up.shape, f"up {tuple(gate.shape)}", tuple(up.shape))
    expect(gate.dtype == up.dtype, f"up in {gate.dtype}", up.dtype)
    _check(gate, up)
    return _kernels(gate).gated_product(gate, up, activation)


def turn_halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys after rotary embedding, where channel i makes a pair with i + D/2. No gradients.

    Args:
        q: [B, H, N, D]; k: [B, KV, N, D]; D is even.
        cos, sin: [B or 1, N, D], all four of one dtype: bfloat16, float16 or float32.

    Returns:
        q cos + (-q2, q1) sin, products rounded to the dtype, and the same of k.

    Raises:
        ValueError: another shape or dtype, or the kernels do not run on this device.
    """
    batch, _, tokens, size = q.shape
    expect(size % 2 == 0, "heads of an even size", size)
    expect((k.shape[0], *k.shape[2:]) == (batch, tokens, size), f"keys ({batch}, KV, {tokens}, {size})", tuple(k.shape))
    for x in (cos, sin):
        fits = x.shape[0] in (1, batch) and x.shape[1:] == (tokens, size)
        expect(fits, f"angles ({batch} or 1, {tokens}, {size})", tuple(x.shape))
        expect(x.dtype == q.dtype == k.dtype, f"all in {q.dtype}", (k.dtype, x.dtype))
    _check(q, k, cos, sin)
    return _kernels(q).turn(q, k, cos, sin)


def _check(*tensors: Tensor) -> None:
    for x in tensors:
        expect(x.dtype in DTYPES, "bfloat16, float16 or float32", x.dtype)
        expect(x.device == tensors[0].device, f"tensors on {tensors[0].device}", x.device)


class _Launch(NamedTuple):
    """The functions of the kernels that are called here."""

    rms_norm: Callable[[Tensor, Tensor, float, NormForm], Tensor]
    gated_product: Callable[[Tensor, Tensor, str], Tensor]
    turn: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@functools.cache
def _launch() -> _Launch | None:
    """The kernels, or None where Triton, which this package does not require, is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from lolcats.ops.elementwise.kernels.rows import run_gated_product, run_rms_norm
    from lolcats.ops.elementwise.kernels.turn import run_turn

    return _Launch(run_rms_norm, run_gated_product, run_turn)


def _kernels(x: Tensor) -> _Launch:
    refusal, launch = kernels_refuse(x.device), _launch()
    expect(refusal is None, "what the kernels can run", refusal)
    assert launch is not None
    return launch
