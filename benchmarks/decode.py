"""Decode time a token and state size after 100 and after 8,000 tokens of context, side by side in one run.

python benchmarks/decode.py [--model demo] [--device cpu] [--contexts 100 8000] [--repeats 5]
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from transformers import DynamicCache

import lolcats
from lolcats.modeling import state_bytes
from lolcats.models.device import describe_device

CHUNK = 1000
"""Tokens of context read at once."""


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, cache: DynamicCache, begin: int, end: int) -> None:
    """Put the tokens begin .. end of ids [1, N] into the cache."""
    for start in range(begin, end, CHUNK):
        model.base_model(input_ids=ids[:, start : min(end, start + CHUNK)], past_key_values=cache, use_cache=True)


@torch.no_grad()
def decode_time(model: Any, ids: torch.Tensor, cache: DynamicCache, context: int, tokens: int = 24) -> float:
    """Median seconds of a token after `context` tokens; the first four do not count."""
    times = []
    for index in range(context, context + tokens):
        start = time.perf_counter()
        model.base_model(input_ids=ids[:, index : index + 1], past_key_values=cache, use_cache=True)
        if ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[4:])[(tokens - 4) // 2]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contexts", type=int, nargs=2, default=[100, 8000])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    model, _ = lolcats.load_teacher(args.model, dtype=torch.bfloat16, device=device)
    lolcats.convert(model, lolcats.LinearizationConfig(sinks=4))
    contexts = args.contexts
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, int(model.config.vocab_size), (1, contexts[1] + 32), generator=generator).to(device)
    caches = []
    for context in contexts:
        caches.append(DynamicCache(config=model.config))
        read(model, ids, caches[-1], 0, context)
    rows = []
    for _ in range(args.repeats):
        first, last = (
            decode_time(model, ids, copy.deepcopy(cache), context)
            for cache, context in zip(caches, contexts, strict=True)
        )
        rows.append((last / first, first, last))
    ratio, first, last = sorted(rows)[args.repeats // 2]
    print(f"{describe_device(device)}: {first * 1e3:.2f} ms after {contexts[0]} tokens, {last * 1e3:.2f} ms after "
          f"{contexts[1]}: ratio {ratio:.3f}")  # fmt: skip
    sizes = [state_bytes(cache) for cache in caches]
    print(f"state {sizes[0]:,} bytes after {contexts[0]} tokens, {sizes[1]:,} after {contexts[1]}")


if __name__ == "__main__":
    main()
