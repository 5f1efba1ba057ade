"""Work of a device in kinds, and how long a GPU takes for it.

Each piece takes the longer of the time of its arithmetic and that of its bytes, and some time for being started. Of
what makers promise a kind of work gets a share. docs/scale.md says which numbers are fitted, and to what.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lolcats.planning.hardware import Gpu

EFFICIENCY = {
    "matmul": 0.75,
    "attention": 0.53,
    "hybrid": 0.128,
    "near": 0.068,
    "given": 0.09,
}
"""Share of a GPU's arithmetic that a kind of work gets: large products (fitted), exact attention with heads of 128
numbers, and the kernels of the mixers (from their own measurements in docs/performance.md)."""
BANDWIDTH = 0.72
"""Share of the bandwidth of its memory: that of a copy on an H100, 2,410 of 3,350 GB/s (docs/performance.md)."""
LAUNCH = 2.5e-6
"""Seconds from the end of a kernel to the beginning of the next in a CUDA graph."""
HOST_LAUNCH = 50e-6
"""Seconds of Python and the driver for a kernel without a graph; the GPU computes meanwhile."""


@dataclass(frozen=True)
class Work:
    """A piece of work of one kind."""

    kind: str
    """A key of `EFFICIENCY`, or "bytes" for what has no arithmetic to speak of."""
    flops: float = 0.0
    bytes: float = 0.0
    """That must come from and go to the GPU's memory."""
    slowness: float = 1.0
    """How much longer its arithmetic takes than that of the large pieces of its kind."""
    kernels: float = 1.0
    waiting: float = 0.0
    """Seconds of what goes on step by step, whatever the GPU."""

    def times(self, count: float) -> Work:
        """The same so many times."""
        return replace(
            self, flops=self.flops * count, bytes=self.bytes * count, kernels=self.kernels * count,
            waiting=self.waiting * count,
        )  # fmt: skip

    def seconds(self, gpu: Gpu) -> float:
        """On a GPU, its kernels recorded in a CUDA graph."""
        arithmetic = self.slowness * self.flops / (gpu.flops * EFFICIENCY[self.kind]) if self.flops else 0.0
        return max(arithmetic, self.bytes / (gpu.bandwidth * BANDWIDTH)) + self.kernels * LAUNCH + self.waiting


def seconds_of(pieces: Iterable[Work], gpu: Gpu, graph: bool) -> float:
    """Of work that is done piece by piece, recorded in a CUDA graph or started by Python, which may be the slower."""
    pieces = list(pieces)
    device = sum(piece.seconds(gpu) for piece in pieces)
    return device if graph else max(device, HOST_LAUNCH * sum(piece.kernels for piece in pieces))
