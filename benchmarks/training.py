"""Tokens a second and peak memory of both training stages, with the settings of a recipe.

python benchmarks/training.py [--recipe hybrid] [--model demo] [--device cuda] [--length 2048] [--sequences 8]
    [--steps 4] [--impl auto]

--model llama-3-8b-shape is a Llama of the sizes of Llama 3 8B with random weights.
"""

from __future__ import annotations

import argparse
import time

import torch

import lolcats
from lolcats.models.device import describe_device
from lolcats.models.shapes import load_or_make
from lolcats.training import FinetuneStage, TransferStage
from lolcats.training.batches import Batch
from lolcats.training.graphs import EAGER_STEPS, GraphedStage


def speed(stage: TransferStage | FinetuneStage, device: torch.device, shape: tuple[int, int], steps: int) -> float:
    """Tokens a second over `steps` steps of random tokens [sequences, length], as `train` takes them, once warm."""
    runner = GraphedStage(stage) if device.type == "cuda" else stage
    optimizer = torch.optim.AdamW(list(stage.parameters().values()), lr=1e-3, fused=device.type == "cuda")
    ids = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(0)).to(device)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), None, None)
    start = 0.0
    for step in range(steps + EAGER_STEPS + 1):
        if step == EAGER_STEPS + 1:
            _wait(device)
            start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            runner.backward(batch, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _wait(device)
    return steps * ids.numel() / (time.perf_counter() - start)


def report(stage: TransferStage | FinetuneStage, device: torch.device, shape: tuple[int, int], steps: int) -> None:
    """Print a line for one stage."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        line = f"{stage.name} {speed(stage, device, shape, steps):,.0f} tokens/s"
    except torch.OutOfMemoryError:
        line = f"{stage.name} out of memory"
    memory = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    print(line + memory)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="hybrid", help="a shipped recipe or a YAML file")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--impl", default="auto", help="implementation of the attention: auto, triton, compiled, chunked"
    )
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    model = load_or_make(args.model, torch.bfloat16, device)
    recipe = lolcats.load_config(args.recipe)
    lolcats.convert(model, recipe.linearization.without_text())  # no text here to match
    for layer in lolcats.linearized_layers(model):
        layer.mixer.impl = args.impl
    shape = (args.sequences, args.length)
    where = f"{describe_device(device)}, torch {torch.__version__}"
    print(f"{args.recipe}, {args.impl}, {args.sequences} x {args.length}, {where}")
    report(TransferStage(model, recipe.transfer), device, shape, args.steps)
    report(FinetuneStage(model, recipe.finetune), device, shape, args.steps)


if __name__ == "__main__":
    main()
