"""Decode time a token and state size after 100 and after 8,000 tokens of context, side by side in one run.

python benchmarks/decode.py [--model demo] [--device cpu] [--contexts 100 8000] [--repeats 5] [--fold 1 4 16 64]

With --fold also the mean time of a step after the first context for each of these numbers of keys that wait for their
block (`linearization.fold`), in turns, with the bytes that a step moves: over as many whole blocks for each of them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from transformers import DynamicCache

import lolcats
from lolcats.evaluation.speed import step_bytes
from lolcats.modeling import linearized_layers, state_bytes
from lolcats.models.device import describe_device

CHUNK = 1000
"""Tokens of context read at once."""


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, cache: DynamicCache, begin: int, end: int) -> None:
    """Put the tokens begin .. end of ids [1, N] into the cache."""
    for start in range(begin, end, CHUNK):
        model.base_model(input_ids=ids[:, start : min(end, start + CHUNK)], past_key_values=cache, use_cache=True)


@torch.no_grad()
def step_times(model: Any, ids: torch.Tensor, cache: DynamicCache, context: int, tokens: int = 20) -> list[float]:
    """Seconds of each of the tokens after `context` tokens; four more, before them, do not count."""
    times, tokens = [], tokens + 4
    for index in range(context, context + tokens):
        start = time.perf_counter()
        model.base_model(input_ids=ids[:, index : index + 1], past_key_values=cache, use_cache=True)
        if ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[4:]


def compare_folds(model: Any, ids: torch.Tensor, folds: list[int], context: int, repeats: int) -> None:
    """Print a line for each of `folds`."""
    tokens, caches, costs = max(folds), {}, {}
    for fold in folds:
        set_fold(model, fold)
        caches[fold], costs[fold] = DynamicCache(config=model.config), step_bytes(model).moved(1, context)
        read(model, ids, caches[fold], 0, context)
    means: dict[int, list[float]] = {fold: [] for fold in folds}
    for _ in range(repeats):
        for fold in folds:
            set_fold(model, fold)
            means[fold].append(statistics.mean(step_times(model, ids, copy.deepcopy(caches[fold]), context, tokens)))
    for fold in folds:
        print(f"fold {fold}: {statistics.median(means[fold]) * 1e3:.2f} ms, the mean of {tokens} steps; "
              f"{costs[fold]:,} bytes a step, state {state_bytes(caches[fold]):,}")  # fmt: skip


def set_fold(model: Any, fold: int) -> None:
    """Let so many keys wait in all layers from now on; states made before fit no more."""
    for layer in linearized_layers(model):
        layer.mixer.settings = layer.mixer.settings._replace(fold=fold)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contexts", type=int, nargs=2, default=[100, 8000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fold", type=int, nargs="+", default=[], help="keys that wait; each divides the largest")
    args = parser.parse_args()
    if any(max(args.fold) % fold for fold in args.fold):
        raise SystemExit("--fold needs numbers that divide the largest of them: each is timed over whole blocks")
    device = torch.device(args.device)
    model, _ = lolcats.load_teacher(args.model, dtype=torch.bfloat16, device=device)
    lolcats.convert(model, lolcats.LinearizationConfig(sinks=4))
    contexts = args.contexts
    generator = torch.Generator().manual_seed(0)
    longest = contexts[1] + 24 + max(args.fold, default=0)
    ids = torch.randint(0, int(model.config.vocab_size), (1, longest), generator=generator).to(device)
    caches = []
    for context in contexts:
        caches.append(DynamicCache(config=model.config))
        read(model, ids, caches[-1], 0, context)
    rows = []
    for _ in range(args.repeats):
        first, last = (
            statistics.median(step_times(model, ids, copy.deepcopy(cache), context))
            for cache, context in zip(caches, contexts, strict=True)
        )
        rows.append((last / first, first, last))
    ratio, first, last = sorted(rows)[args.repeats // 2]
    print(f"{describe_device(device)}: {first * 1e3:.2f} ms after {contexts[0]} tokens, {last * 1e3:.2f} ms after "
          f"{contexts[1]}: ratio {ratio:.3f}")  # fmt: skip
    sizes = [state_bytes(cache) for cache in caches]
    print(f"state {sizes[0]:,} bytes after {contexts[0]} tokens, {sizes[1]:,} after {contexts[1]}")
    if args.fold:
        compare_folds(model, ids, args.fold, contexts[0], args.repeats)


if __name__ == "__main__":
    main()
