"""Time on a device, and how fast it moves bytes."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

COPIES = 10
"""Copies of one timing, so that starting them does not count."""


def wait(device: torch.device) -> None:
    """Wait for the work that was given to a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """How long a call takes, its work on the device included."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes a second that a copy moves, those read and those written.

    Args:
        device: where.
        size: bytes of what is copied; None is 1 GiB on a GPU and 256 MiB on a CPU, beyond what its caches hold.
    """
    source = torch.zeros(size or (2**28 if device.type == "cpu" else 2**30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(COPIES):
            target.copy_(source)

    copy()
    return 2 * COPIES * source.numel() / statistics.median(seconds(copy, device) for _ in range(3))


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
