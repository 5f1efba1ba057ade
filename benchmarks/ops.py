"""Hybrid attention by the Triton kernels, feature maps included, against other attention: a dated table on a GPU.

python benchmarks/ops.py [--lengths 2048 32768] [--backward 4096 16384] [--heads 32] [--kv-heads 8] [--size 128]
    [--window 64] [--window-kind sliding] [--sinks 0] [--state-heads query] [--decode 1 64] [--fold 1 16] [--batch 1]
    [--no-peers] [--both] [--json FILE]

Everything is timed as a CUDA graph, median of the replays. Before that the kernels are compared with torch's chunked
form on the same numbers; a result that is off stops the program. The peers, where they are installed: SDPA with flash
attention and with cuDNN (causal), FlexAttention over the window alone, flash-linear-attention's chunk_linear_attn (the
linear half alone, features given), and these two joined into the hybrid layer (features given, keys delayed by the
window, row sums from columns of ones, FlexAttention's log-sum-exp as the window's denominator).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lolcats.evaluation.speed.clock import copy_bandwidth
from lolcats.models.device import describe_device
from lolcats.ops import HybridSpec, MapWeights, hybrid_attention, hybrid_step
from lolcats.ops.hybrid.kernels import segment_launch

REPLAYS, LEAST, SECONDS = 30, 5, 2.0
"""Replays of one measurement: at most REPLAYS, fewer where they take longer than SECONDS, never less than LEAST."""
segments_from = functools.partial(mock.patch.object, segment_launch, "SHORTEST")
"""Inside `segments_from(n)`, forward passes that can go by segments do so from n tokens on."""


def time_graph(run: Callable[[], Any]) -> float:
    """Milliseconds of one call, replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    while len(times) < REPLAYS and (len(times) < LEAST or sum(times) < 1000 * SECONDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


class Inputs:
    """q [B, H, N, D], k and v [B, KV, N, D] bfloat16, in the layout of a layer, and the maps (F = D)."""

    def __init__(self, n: int, args: argparse.Namespace, gradients: bool = False, batch: int = 1) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        heads, kv_heads, size = args.heads, args.kv_heads, args.size

        def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

        self.q, self.k, self.v = (normal(batch, n, h, size).transpose(1, 2) for h in (heads, kv_heads, kv_heads))
        map_heads = heads if args.state_heads == "query" else kv_heads
        weights = (normal(h, size, size // 2, dtype=torch.float32) / 5 for h in (heads, map_heads))
        self.maps = MapWeights("hedgehog", *weights, log_scale=torch.zeros(heads, device="cuda"))
        self.factor = torch.zeros(heads, device="cuda")
        self.spec = HybridSpec(args.window, args.window_kind, args.sinks)
        self.leaves = [self.q, self.k, self.v, self.maps.q, self.maps.k, self.factor]
        for leaf in self.leaves:
            leaf.requires_grad_(gradients)

    def hybrid(self, impl: str = "triton") -> Tensor:
        """The layer."""
        return hybrid_attention(self.q, self.k, self.v, self.maps, self.factor, self.spec, impl=impl).out

    def repeated(self) -> tuple[Tensor, Tensor]:
        """k and v for each query head, for peers that want them so."""
        groups = self.q.shape[1] // self.k.shape[1]
        return self.k.repeat_interleave(groups, 1), self.v.repeat_interleave(groups, 1)


def check(args: argparse.Namespace) -> None:
    """Stop if the kernels are not what torch computes, in outputs or gradients."""
    x = Inputs(1000, args, gradients=True)
    results = []
    for impl in ("triton", "chunked"):
        out = x.hybrid(impl)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), x.leaves)])
        with torch.no_grad(), segments_from(1):
            results[-1].append(x.hybrid(impl))
    for index, (got, want) in enumerate(zip(*results, strict=True)):
        error = float((got - want).detach().float().norm() / want.detach().float().norm())
        if not error <= 0.02:
            raise SystemExit(f"result {index} of the kernels is off by {error:.3g}: nothing is timed")


def peers(x: Inputs) -> dict[str, Callable[[], Any]]:
    """Other attention on the same numbers."""
    k, v = x.repeated()
    found: dict[str, Callable[[], Any]] = {}
    for name, backend in (("SDPA flash", SDPBackend.FLASH_ATTENTION), ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION)):
        found[name] = functools.partial(_sdpa, backend, x.q, k, v)
    window = x.spec.window
    near = _flex(x.q, k, v, window)
    found["FlexAttention window"] = near
    try:
        from fla.ops.linear_attn import chunk_linear_attn  # type: ignore[import-not-found]
    except ImportError:
        return found
    phi_q, phi_k = (f.to(torch.bfloat16).transpose(1, 2).contiguous() for f in (x.maps.phi_q(x.q), x.maps.phi_k(x.k)))
    if phi_k.shape[2] == phi_q.shape[2]:
        values = v.transpose(1, 2).contiguous()
        found["fla linear alone"] = lambda: chunk_linear_attn(phi_q, phi_k, values, normalize=False)
        linear = functools.partial(chunk_linear_attn, normalize=False)
        found["joined"] = _joined(linear, (phi_q, phi_k, values), near, window)
    return found


def _joined(linear: Callable[..., Any], operands: tuple[Tensor, ...], near: Callable[[], Any], w: int) -> Any:
    """The hybrid layer of two peers: `linear` over keys delayed by w tokens, and the window."""
    phi_q, phi_k, values = operands
    ones = torch.ones_like(values[..., :16])
    delayed_k, delayed_v = (nnf.pad(t, (0, 0, 0, 0, w, 0))[:, :-w] for t in (phi_k, torch.cat([values, ones], -1)))
    delayed_k, delayed_v = delayed_k.contiguous(), delayed_v.contiguous()

    def join(out: Tensor, lse: Tensor, sums: Tensor) -> Tensor:
        share = 0.5 * torch.exp(lse)[..., None]
        sums = sums.transpose(1, 2).float()
        return ((share * out + sums[..., :-16]) / (share + sums[..., -1:])).to(out.dtype)

    joined: Callable[..., Tensor] = torch.compile(join, dynamic=False)

    def run() -> Tensor:
        sums = linear(phi_q, delayed_k, delayed_v)
        return joined(*near(), sums[0] if isinstance(sums, tuple) else sums)

    return run


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return nnf.scaled_dot_product_attention(q, k, v, is_causal=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Callable[[], Any]:
    """Window attention; returns outputs and log-sum-exps."""
    from torch.nn.attention.flex_attention import flex_attention

    run = torch.compile(flex_attention, dynamic=False)
    mask = _window_mask(q.shape[2], window)
    return lambda: run(q, k, v, block_mask=mask, return_lse=True)


def _window_mask(n: int, window: int, size: int = 128) -> Any:
    """The blocks of a causal window, written down: finding them from the mask takes minutes at great lengths."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks, reach = -(-n // size), -(-(window - 1) // size)
    row = torch.arange(blocks, device="cuda", dtype=torch.int32)
    first = (row - reach).clamp(min=0)
    indices = (first[:, None] + row).clamp(max=blocks - 1)  # those after the first row - first + 1 are not read
    counts = row - first + 1

    def near(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & (i - j < window)

    return BlockMask.from_kv_blocks(
        counts[None, None].contiguous(),
        indices[None, None].contiguous(),
        BLOCK_SIZE=size,
        mask_mod=near,
        seq_lengths=(n, n),
    )


def forward_row(n: int, args: argparse.Namespace) -> dict[str, Any]:
    """Forward passes at one length, and the bytes a second that the kernels move of what they must move."""
    torch.compiler.reset()  # each length is compiled anew, and there is a limit on that
    x = Inputs(n, args, batch=args.batch)
    with torch.no_grad():
        row: dict[str, Any] = {"pass": "forward", "tokens": n, "hybrid": time_graph(x.hybrid)}
        for name, shortest in {"by segments": 1, "by blocks": sys.maxsize}.items() if args.both else ():
            with segments_from(shortest):
                row[name] = time_graph(x.hybrid)
        for name, run in peers(x).items() if args.peers else ():
            row[name] = _or_reason(run)
    moved = 2 * (2 * x.q.numel() + x.k.numel() + x.v.numel())
    row["GB/s of q, k, v, out"] = moved / row["hybrid"] / 1e6
    return row


def backward_row(n: int, args: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward: all gradients, and those of attention transfer."""
    x = Inputs(n, args, gradients=True)
    grad = torch.randn_like(x.q)
    row: dict[str, Any] = {"pass": "forward + backward", "tokens": n}
    torch.autograd.grad(x.hybrid(), x.leaves, grad)
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(x.hybrid(), x.leaves, grad)
    row["peak / (q + k + v)"] = torch.cuda.max_memory_allocated() / (2 * (x.q.numel() + 2 * x.k.numel()))
    row["hybrid"] = time_graph(lambda: torch.autograd.grad(x.hybrid(), x.leaves, grad))
    k, v = (t.detach().requires_grad_() for t in x.repeated())
    flash = functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION, x.q, k, v)
    if args.peers:
        row["SDPA flash"] = _or_reason(lambda: torch.autograd.grad(flash(), [x.q, k, v], grad))
    for leaf in x.leaves[:3]:
        leaf.requires_grad_(False)
    row["hybrid, maps only"] = time_graph(lambda: torch.autograd.grad(x.hybrid(), x.leaves[3:], grad))
    return row


@torch.no_grad()
def decode_row(batch: int, fold: int, args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """A decoding step with a full ring, in the mean over a block of `fold` keys, beside its bytes and plain torch.

    The texts of the batch are of all lengths modulo `fold`, so as many of them complete their block in each step.
    """
    x = Inputs(args.window + 2 * fold, args, batch=batch)
    spec = x.spec._replace(fold=fold)
    mask = torch.arange(x.q.shape[2], device="cuda") >= torch.arange(batch, device="cuda")[:, None] % fold
    state = hybrid_attention(
        x.q, x.k, x.v, x.maps, x.factor, spec, attention_mask=mask, impl="triton", return_state=True
    ).state
    assert state is not None
    q, k, v = (t[:, :, -1:].contiguous() for t in (x.q, x.k, x.v))

    def steps(impl: str) -> None:
        now = state
        for _ in range(fold):
            _, now = hybrid_step(q, k, v, x.maps, x.factor, now, spec, donate=True, impl=impl)

    sums, ring = (sum(t.numel() * t.element_size() for t in part) for part in (state.linear, state.window[:2]))
    row: dict[str, Any] = {"pass": "decode", "batch": batch, "fold": fold}
    row["plain torch"] = time_graph(lambda: steps("recurrent")) / fold
    row["hybrid"] = time_graph(lambda: steps("triton")) / fold
    row["bytes / bandwidth"] = 1e-6 * (sums * (1 + 1 / fold) + ring) / bandwidth
    return {**row, "ratio": row["hybrid"] / row["bytes / bandwidth"]}


def _or_reason(run: Callable[[], Any]) -> float | str:
    try:
        return time_graph(run)
    except Exception as error:  # a peer that cannot run here is a line in the table, not the end of it
        return str(error).strip().splitlines()[0][:60]


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096, 16384, 32768, 131072])
    parser.add_argument("--backward", type=int, nargs="*", default=[4096, 16384, 131072])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--window-kind", choices=["sliding", "terraced"], default="sliding")
    parser.add_argument("--sinks", type=int, default=0)
    parser.add_argument("--state-heads", choices=["query", "kv"], default="query")
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 64], help="batch sizes of a decoding step")
    parser.add_argument("--fold", type=int, nargs="*", default=[1, 16], help="keys that wait, of a decoding step")
    parser.add_argument("--batch", type=int, default=1, help="texts of a forward pass")
    parser.add_argument("--both", action="store_true", help="time the forward pass by segments and by blocks")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="time the peers too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/ops.py needs a CUDA device: kernels are not timed elsewhere")
    check(args)
    device = describe_device(torch.device("cuda"))
    head = {"date": datetime.date.today().isoformat(), "device": device, "torch": torch.__version__}
    bandwidth = copy_bandwidth(torch.device("cuda")) / 1e9
    result = {**head, "copy GB/s": bandwidth, "settings": {k: v for k, v in vars(args).items() if k != "json"}}
    print(", ".join(f"{k} {v}" for k, v in result.items()), flush=True)
    jobs = [functools.partial(forward_row, n, args) for n in args.lengths]
    jobs += [functools.partial(backward_row, n, args) for n in args.backward]
    jobs += [functools.partial(decode_row, batch, fold, args, bandwidth) for batch in args.decode for fold in args.fold]
    rows: list[dict[str, Any]] = []
    for job in jobs:
        rows.append(job())
        print(
            "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True
        )
        if args.json:  # after each row: a long run that is stopped keeps what it has
            args.json.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
