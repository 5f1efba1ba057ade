"""What operations ask of a device, or set there, in each call: it takes microseconds, and a layer has few to spare."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Inside, no autocast on devices of this kind; where there is none as it is, nothing happens."""
    is_off = not torch.compiler.is_compiling() and not torch.is_autocast_enabled(kind)
    return nullcontext() if is_off else torch.autocast(kind, enabled=False)


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of x the one on which kernels are launched, where it is not."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch.cuda.current_device() else nullcontext()
