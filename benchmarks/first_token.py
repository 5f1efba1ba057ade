"""Time of a prompt, teacher and student side by side in one process, with the kernels that the student's takes.

python benchmarks/first_token.py [--model llama-3-8b-shape] [--recipe recommended] [--lengths 512 4096 32768]
    [--rows 1024] [--kernels 20]

Of the model its configuration alone is read; weights are random. A prompt is `model(input_ids, use_cache=True,
logits_to_keep=1)`, one text, mean of three after two. With --rows the state after the longest prompt of up to 4,096
tokens is repeated for so many texts, and steps of all of them are timed.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import lolcats
from lolcats.modeling.decode_graphs import graphs_of
from lolcats.modeling.fused_prompts import prompts_of
from lolcats.models.device import describe_device
from lolcats.models.shapes import random_model

LONGEST, STEPS = 4096, 16


def seconds(run: Callable[[], Any], device: torch.device, repeats: int = 3, before: int = 2) -> float:
    """Of a call, mean."""
    for _ in range(before):
        run()
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait(device)
    return (time.perf_counter() - start) / repeats


def wait(device: torch.device) -> None:
    """Until all is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def read(model: Any, ids: torch.Tensor) -> Any:
    """A prompt."""
    return model(input_ids=ids, use_cache=True, logits_to_keep=1)


def kernels(run: Callable[[], Any], device: torch.device, most: int) -> None:
    """Say how many kernels there are, their sum, and those that take most."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as told:
        run()
        wait(device)
    events = [event for event in told.events() or () if event.device_type.name == "CUDA"]
    times: Counter[str] = Counter()
    for event in events:
        times[event.name[:80]] += event.device_time
    print(f"  {len(events):,} kernels, {sum(times.values()) / 1e3:.1f} ms in all", flush=True)
    for name, spent in times.most_common(most):
        print(f"  {spent / 1e3:9.2f} ms  {name}")


@torch.inference_mode()
def step(model: Any, ids: torch.Tensor, rows: int, device: torch.device) -> None:
    """Say what a step of so many texts takes."""
    cache = read(model, ids[:, :LONGEST]).past_key_values
    cache.batch_repeat_interleave(rows)
    token = ids[:, :1].expand(rows, 1).contiguous()
    spent = seconds(lambda: model(input_ids=token, past_key_values=cache, use_cache=True), device, STEPS, 4)
    replayed = "replayed" if graphs_of(model).replays else "eager"
    print(f"{rows:,} texts after {min(LONGEST, ids.shape[1]):,} tokens: {spent * 1e3:.2f} ms a step, "
          f"{rows / spent:,.0f} tokens/s, {replayed}")  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3-8b-shape", help="a shape, a hub name, or a folder with config.json")
    parser.add_argument("--recipe", default="recommended")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096, 32768])
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--kernels", type=int, default=20)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = random_model(args.model, torch.bfloat16, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (1, max(args.lengths)), generator=generator).to(device)
    print(describe_device(device), f"{args.model}, {args.recipe}", sep=", ")
    teacher = {n: seconds(lambda n=n: read(model, ids[:, :n]), device) for n in args.lengths}
    lolcats.convert(model, lolcats.load_config(args.recipe).linearization, input_ids=ids[:, :1024])
    for n in args.lengths:
        own = seconds(lambda n=n: read(model, ids[:, :n]), device)
        print(f"{n:,} tokens: student {own * 1e3:.1f} ms, teacher {teacher[n] * 1e3:.1f}, {teacher[n] / own:.2f} times")
        if device.type == "cuda":
            kernels(lambda n=n: read(model, ids[:, :n]), device, args.kernels)
    print(f"by fused kernels: {prompts_of(model).read} prompts")
    if args.rows:
        step(model, ids, args.rows, device)


if __name__ == "__main__":
    main()
