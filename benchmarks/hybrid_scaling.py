"""Time and memory of `hybrid_attention` against the length of the text. An implementation that is wrong is not timed.

    python benchmarks/hybrid_scaling.py --lengths 1024 2048 4096 --impl chunked --backward --json scaling.json

On the CPU each length runs in a process of its own, so that its peak memory is its own. Defaults are the shapes of a
SmolLM2-135M layer: 9 query heads on 3 key heads of size 64.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import platform
import resource
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lolcats.ops import IMPLEMENTATIONS, HybridSpec, hybrid_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
CHECK_LENGTH = 200


class Setup(NamedTuple):
    """What is measured."""

    device: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    features: int
    feature_heads: str
    window: int
    window_kind: str
    sinks: int
    impl: str
    backward: bool
    repeats: int

    def inputs(self, n: int) -> list[Tensor]:
        """q, k, v, phi_q, phi_k, window_factor; they require gradients."""
        generator = torch.Generator().manual_seed(n)
        key_maps = self.heads if self.feature_heads == "query" else self.kv_heads
        sizes = [(self.heads, self.head_dim), (self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim)]
        normal = [torch.randn(self.batch, h, n, d, generator=generator) for h, d in sizes]
        maps = [torch.rand(self.batch, h, n, self.features, generator=generator) for h in (self.heads, key_maps)]
        tensors = [*normal, *(m / self.features for m in maps), torch.zeros(self.heads)]
        return [x.to(self.device, DTYPES[self.dtype]).requires_grad_() for x in tensors]

    def attend(self, inputs: list[Tensor], impl: str) -> Tensor:
        """The output of one call."""
        q, k, v, phi_q, phi_k, factor = inputs
        spec = HybridSpec(self.window, self.window_kind, self.sinks)
        return hybrid_attention(q, k, v, (phi_q, phi_k), factor, spec, impl=impl).out


class Row(NamedTuple):
    """The result of one length."""

    length: int
    forward_ms: float
    forward_backward_ms: float | None
    peak_mib: float


def results(setup: Setup, inputs: list[Tensor], impl: str) -> list[Tensor]:
    """Output and gradients."""
    out = setup.attend(inputs, impl)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs)]


def find_error(setup: Setup) -> str | None:
    """Compare output and gradients with the float64 reference; None if they are as good as the reference in `dtype`."""
    inputs = setup.inputs(CHECK_LENGTH)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = results(setup, exact, "reference")
    want, got = (results(setup, inputs, impl) for impl in ("reference", setup.impl))
    names = ["output", *(f"gradient of {x}" for x in ("q", "k", "v", "phi_q", "phi_k", "window_factor"))]
    margin = 1e-9 if setup.dtype == "float64" else 1e-4
    for name, t, a, b in zip(names, truth, want, got, strict=True):
        size = t.abs().max().item()
        allowed = 1.5 * (a.double() - t).abs().max().item() + margin * size
        error = (b.double() - t).abs().max().item()
        if not error <= allowed:
            return f"{name} is off by {error:.2e}, allowed are {allowed:.2e}"
    return None


def least_ms(call: Callable[[], object], setup: Setup) -> float:
    """Least wall time of `call` in milliseconds, after one that does not count: other jobs can only add to it."""
    times = []
    for _ in range(setup.repeats + 1):
        synchronize(setup.device)
        start = time.perf_counter()
        call()
        synchronize(setup.device)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_bytes(device: str) -> int:
    """Most memory in use so far: by tensors (CUDA) or by this process (CPU)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(setup: Setup, length: int) -> Row:
    """Time and memory at one length. The inputs do not count as memory."""

    def forward() -> None:
        with torch.no_grad():
            setup.attend(inputs, setup.impl)

    def forward_backward() -> None:
        out = setup.attend(inputs, setup.impl)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    inputs = setup.inputs(CHECK_LENGTH)
    if setup.impl != "compiled":  # libraries and threads are loaded before memory is counted
        (forward_backward if setup.backward else forward)()
    inputs = setup.inputs(length)
    if setup.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(setup.device)
    before = peak_bytes(setup.device)
    forward_ms = least_ms(forward, setup)
    both_ms = least_ms(forward_backward, setup) if setup.backward else None
    return Row(length, forward_ms, both_ms, (peak_bytes(setup.device) - before) / 2**20)


def in_process(call: Callable[..., Any], *arguments: object) -> Any:
    """Run `call` in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def per_doubling(now: Row, before: Row | None, field: str) -> str:
    """How much `field` grows when the length doubles."""
    if before is None or getattr(before, field) <= 0 or now.length == before.length:
        return "     "
    growth = getattr(now, field) / getattr(before, field)
    return f"x{growth ** (1 / math.log2(now.length / before.length)):4.2f}"


def print_row(row: Row, before: Row | None) -> None:
    cells = [f"{row.length:8d}"]
    for field in Row._fields[1:]:
        value = getattr(row, field)
        if value is not None:
            cells.append(f"{value:12.1f} {per_doubling(row, before, field)}")
    print(" ".join(cells), flush=True)


def measure_all(setup: Setup, lengths: list[int]) -> list[Row]:
    """A row for each length, printed as it comes; ends early where memory does."""
    heads = ["forward ms", *(["fwd + bwd ms"] if setup.backward else []), "peak MiB"]
    print("  length " + " ".join(f"{head:>12} {'/2n':<5}" for head in heads))
    rows: list[Row] = []
    for length in lengths:
        try:
            on_cuda = setup.device.startswith("cuda")
            row = measure(setup, length) if on_cuda else in_process(measure, setup, length)
        except (torch.cuda.OutOfMemoryError, BrokenProcessPool) as error:
            print(f"{length:8d} stopped, out of memory? ({type(error).__name__})")
            break
        print_row(row, rows[-1] if rows else None)
        rows.append(row)
    return rows


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {torch.get_num_threads()} threads"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**i for i in range(10, 16)])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--feature-heads", choices=("query", "kv"), default="kv", help="phi_k a query or a key head")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--window-kind", choices=("sliding", "terraced"), default="sliding")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--impl", choices=IMPLEMENTATIONS, default="chunked")
    parser.add_argument("--backward", action="store_true", help="also time forward + backward; memory is then of both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the results here")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    setup = Setup(**{name: getattr(arguments, name) for name in Setup._fields})
    error = find_error(setup) if setup.device.startswith("cuda") else in_process(find_error, setup)
    if error is not None:
        print(f"not timed: {setup.impl} differs from the reference, {error}", file=sys.stderr)
        return 1
    name = device_name(setup.device)
    print(f"{setup.impl}, {setup.dtype}, {name}, torch {torch.__version__}")
    rows = measure_all(setup, arguments.lengths)
    if arguments.json is not None:
        record = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": name,
            "torch": torch.__version__,
            "command": shlex.join(["python", *sys.argv]),
            "setup": setup._asdict(),
            "rows": [row._asdict() for row in rows],
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
