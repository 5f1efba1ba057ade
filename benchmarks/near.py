"""Near attention by the Triton kernels: whole texts, forward and backward, the selection alone, and the decoding step;
and what a learned score is trained on, the attention that later queries give each key.

python benchmarks/near.py [--lengths 2048 131072] [--tokens 16384] [--decode 1 64 256] [--cuts] [--torch 16384]
    [--heads 9] [--kv-heads 3] [--size 64] [--window 256] [--sinks 4] [--pairs 192] [--json FILE]

A row of the table has as many texts as give `--tokens` tokens, at least one. Everything is timed as a CUDA graph,
median of the replays. Before that the kernels are compared with the form in torch on the same numbers; a result that is
off stops the program. `--cuts` also times each way to cut the programs that `CUTS` names, on the shortest texts.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolcats.evaluation.speed.clock import copy_bandwidth
from lolcats.mixers import Call
from lolcats.mixers.scores import attention_given, attention_given_beyond
from lolcats.models.device import describe_device
from lolcats.ops.near import NearSpec, near_attention, near_step
from lolcats.ops.near.kernels import given, launch
from lolcats.ops.near.selection import EMPTY, select_pairs
from ops import time_graph  # pyright: ignore[reportAttributeAccessIssue]

CUTS: dict[str, list[dict[str, int]]] = {
    "BY_QUERIES": [
        {"ROWS": rows, "KEYS": keys, "STAGES": stages, "num_warps": warps}
        for (rows, warps), keys, stages in itertools.product(((128, 8), (128, 4), (64, 4)), (32, 64, 128), (1, 2, 3))
    ],
    "BY_KEYS": [
        {"ROWS": rows, "KEYS": keys, "STAGES": stages, "num_warps": warps}
        for rows, (keys, warps), stages in itertools.product((32, 64, 128), ((64, 4), (64, 8), (128, 8)), (1, 2, 3))
    ],
}


class Inputs:
    """q [B, H, N, D], k and v [B, KV, N, D] bfloat16 in the layout of a layer, and scores [B, KV, N]."""

    def __init__(self, batch: int, n: int, args: argparse.Namespace, gradients: bool = False) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        self.spec = NearSpec(args.window, args.sinks, args.pairs)

        def normal(heads: int) -> Tensor:
            shape = batch, n, heads, args.size
            return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

        self.leaves = [normal(heads).requires_grad_(gradients) for heads in (args.heads, args.kv_heads, args.kv_heads)]
        self.score = torch.randn(batch, args.kv_heads, n, generator=generator, device="cuda") if args.pairs else None
        self.grad = normal(args.heads)
        self.windows = tuple(args.window // (1 + head) + 1 for head in range(args.kv_heads))
        """Of attention given: key heads have windows of their own."""

    def out(self, impl: str = "triton") -> Tensor:
        """Of the layer."""
        q, k, v = self.leaves
        return near_attention(q, k, v, self.spec, score=self.score, impl=impl).out

    def gradients(self, impl: str = "triton") -> Any:
        """Of q, k and v."""
        return torch.autograd.grad(self.out(impl), self.leaves, self.grad)

    def given(self, by_kernels: bool = True) -> Tensor:
        """The attention that later queries give each key."""
        q, k, v = (x.detach() for x in self.leaves)
        call = Call(q, k, v, v, q.shape[-1] ** -0.5)
        return attention_given(call, self.windows) if by_kernels else attention_given_beyond(call, [self.windows])[0]


def check(args: argparse.Namespace) -> None:
    """Stop if the kernels are not what torch computes, in outputs or gradients."""
    x = Inputs(2, 1000, args, gradients=True)
    results = [[x.out(impl), *x.gradients(impl), x.given(impl == "triton")] for impl in ("triton", "chunked")]
    for index, (got, want) in enumerate(zip(*results, strict=True)):
        error = float((got - want).detach().float().norm() / want.detach().float().norm())
        if not error <= 0.02:
            raise SystemExit(f"result {index} of the kernels is off by {error:.3g}: nothing is timed")


def text_row(n: int, args: argparse.Namespace) -> dict[str, Any]:
    """Texts of n tokens."""
    batch = max(1, args.tokens // n)
    x = Inputs(batch, n, args, gradients=True)
    row: dict[str, Any] = {"texts": batch, "tokens": n}
    with torch.no_grad():
        row["forward"] = time_graph(x.out)
        if x.score is not None:
            held, score = torch.full((batch, args.kv_heads, args.pairs), EMPTY, device="cuda"), x.score
            row["of which selection"] = time_graph(lambda: select_pairs(held, score, launch.BLOCK))
    row["forward + backward"] = time_graph(x.gradients)
    torch.cuda.reset_peak_memory_stats()
    x.gradients()
    q, k, v = x.leaves
    row["peak / (q + k + v)"] = torch.cuda.max_memory_allocated() / (2 * (q.numel() + k.numel() + v.numel()))
    if batch * n <= args.torch:
        row["torch forward + backward"] = time_graph(lambda: x.gradients("chunked"))
    return row


def given_row(n: int, args: argparse.Namespace) -> dict[str, Any]:
    """The attention that later queries give each key of one text of n tokens: a step of training reads no more."""
    x = Inputs(1, n, args)
    row: dict[str, Any] = {"attention given, tokens": n, "kernels": time_graph(x.given)}
    if n <= args.torch:
        row["torch"] = time_graph(lambda: x.given(False))
    return row


def cut_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way to cut the programs that a GPU takes."""
    n = min(args.lengths)
    x, rows = Inputs(max(1, args.tokens // n), n, args, gradients=True), []
    for name, cuts in CUTS.items():
        usual = getattr(launch, name)
        for cut in cuts:
            for module in (launch, given):
                setattr(module, name, cut)
            try:
                with torch.no_grad():
                    forward = time_graph(x.out)
                times = {"forward + backward": time_graph(x.gradients), "attention given": time_graph(x.given)}
                rows.append({name: cut, "forward": forward, **times})
            except Exception as error:  # too much shared memory, say: a line in the table, not the end of it
                rows.append({name: cut, "failed": str(error).strip().splitlines()[0][:60]})
            show(rows[-1])
        for module in (launch, given):
            setattr(module, name, usual)
    return rows


@torch.no_grad()
def decode_row(batch: int, args: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    """One decoding step of full states, beside the time of its bytes at `bandwidth` (GB/s) and plain torch."""
    x = Inputs(batch, args.window + args.pairs + args.sinks + 6, args)
    q, k, v = x.leaves
    state = near_attention(q, k, v, x.spec, score=x.score, return_state=True, impl="triton").state
    assert state is not None
    q, k, v = (t[:, :, -1:].contiguous() for t in x.leaves)
    score = None if x.score is None else x.score[:, :, -1:].contiguous()

    def step(impl: str) -> Any:
        return near_step(q, k, v, state, x.spec, score=score, donate=True, impl=impl)

    least = 1e-6 * sum(t.numel() * t.element_size() for t in state.tensors()) / bandwidth
    row: dict[str, Any] = {"step of": batch, "plain torch": time_graph(lambda: step("chunked"))}
    row["kernel"] = time_graph(lambda: step("triton"))
    return {**row, "bytes / bandwidth": least, "ratio": row["kernel"] / least}


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 8192, 32768, 131072])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--torch", type=int, default=16384, help="time the form in torch up to so many tokens")
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 64, 256], help="texts of a decoding step")
    parser.add_argument("--cuts", action="store_true", help="time other ways to cut the programs too")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=192)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print, store."""
    args = parse()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/near.py needs a CUDA device: kernels are not timed elsewhere")
    check(args)
    device = describe_device(torch.device("cuda"))
    bandwidth = copy_bandwidth(torch.device("cuda")) / 1e9
    result = {"date": datetime.date.today().isoformat(), "device": device, "torch": torch.__version__}
    result |= {"copy GB/s": bandwidth, "settings": {k: v for k, v in vars(args).items() if k != "json"}}
    print(", ".join(f"{k} {v}" for k, v in result.items()), flush=True)
    rows: list[dict[str, Any]] = []
    for n in args.lengths:
        rows.append(text_row(n, args))
        show(rows[-1])
        rows.append(given_row(n, args))
        show(rows[-1])
    for batch in args.decode:
        rows.append(decode_row(batch, args, bandwidth))
        show(rows[-1])
    if args.cuts:
        rows += cut_rows(args)
    if args.json:
        args.json.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
