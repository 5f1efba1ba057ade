"""Decode time a token and state size after 100 and after 8,000 tokens of context, side by side in one run.

python benchmarks/decode.py [--model demo] [--contexts 100 8000] [--repeats 5]
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

CHUNK = 1000
"""Tokens of context read at once."""


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, cache: DynamicCache, begin: int, end: int) -> None:
    """Put the tokens begin .. end of ids [1, N] into the cache."""
    for start in range(begin, end, CHUNK):
        model.base_model(input_ids=ids[:, start : min(end, start + CHUNK)], past_key_values=cache, use_cache=True)


@torch.no_grad()
def decode_time(model: Any, ids: torch.Tensor, cache: DynamicCache, context: int, tokens: int = 24) -> float:
    """Median seconds of a token after `context` tokens."""
    times = []
    for index in range(context, context + tokens):
        start = time.perf_counter()
        model.base_model(input_ids=ids[:, index : index + 1], past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - start)
    return sorted(times)[tokens // 2]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--contexts", type=int, nargs=2, default=[100, 8000])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    model, _ = lolcats.load_teacher(args.model, dtype=torch.bfloat16)
    lolcats.convert(model, lolcats.LinearizationConfig(sinks=4))
    short, long = args.contexts
    ids = torch.randint(0, int(model.config.vocab_size), (1, long + 32), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    read(model, ids, cache, 0, short)
    early = copy.deepcopy(cache)
    read(model, ids, cache, short, long)
    rows = []
    for _ in range(args.repeats):
        first = decode_time(model, ids, copy.deepcopy(early), short)
        last = decode_time(model, ids, copy.deepcopy(cache), long)
        rows.append((last / first, first, last))
    ratio, first, last = sorted(rows)[args.repeats // 2]
    print(f"decode {first * 1e3:.1f} ms after {short} tokens, {last * 1e3:.1f} ms after {long}: ratio {ratio:.3f}")
    print(f"state {state_bytes(early):,} bytes after {short} tokens, {state_bytes(cache):,} after {long}")


if __name__ == "__main__":
    main()
