"""Milliseconds a token of `generate` on a linearized model with and without CUDA graphs, and on its teacher.

python benchmarks/generate.py [--model demo] [--recipe recommended] [--device cuda] [--batch 1 64] [--context 512]
    [--tokens 32] [--compiled-teacher]

The layers are those of a recipe, untrained. The time of a token is the difference of two texts, so that reading the
prompt does not count; `lolcats bench` times forward passes alone, which are the same without what `generate` does
around them, beside the teacher's graph and the limit of the bytes. --compiled-teacher also has `generate` compile the
teacher with a static cache. --model llama-3-8b-shape is a Llama of the sizes of Llama 3 8B with random weights.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

import lolcats
from lolcats.evaluation.speed.clock import wait
from lolcats.modeling.decode_graphs import graphs_of
from lolcats.models.device import describe_device
from lolcats.models.shapes import load_or_make

WARM = 4
"""Tokens of a first text: kernels are compiled and steps recorded in it."""


def generate_time(model: Any, ids: Tensor, tokens: int, **options: Any) -> tuple[float, Tensor]:
    """Milliseconds a token, and the longer text."""
    times, text = [], ids
    for new in (WARM, tokens // 2, tokens):
        wait(ids.device)
        start = time.perf_counter()
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options)
        wait(ids.device)
        times.append(time.perf_counter() - start)
    return 1e3 * (times[2] - times[1]) / (tokens - tokens // 2), text


def show(name: str, milliseconds: float) -> None:
    """Print a row."""
    print(f"{name:36}{milliseconds:>12.2f}", flush=True)


def measure(model: Any, ids: Tensor, tokens: int) -> None:
    """Print the rows of a linearized model for prompts [B, N]."""
    texts, graphs = [], graphs_of(model)
    for name, enabled in (("linearized, eager", False), ("linearized, graphs", True)):
        lolcats.set_decode_graphs(model, enabled)
        written, text = generate_time(model, ids, tokens)
        texts.append(text[:, ids.shape[1] :])
        show(name, written)
    if ids.is_cuda and not graphs.recordings:
        print("no step was replayed: a warning above says why")
    same = float((texts[0] == texts[1]).float().mean())
    print(f"{same:.1%} of the tokens are the same")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipe", default="recommended", help="a shipped recipe or a YAML file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--compiled-teacher", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    model: Any = load_or_make(args.model, torch.bfloat16, device)
    model.generation_config.eos_token_id = None  # texts of a fixed length
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (max(args.batch), max(args.context, 1024)), generator=random).to(device)
    print(
        f"{describe_device(device)}, torch {torch.__version__}: {args.model}, {args.recipe}, {args.context} tokens read"
    )
    for rows in args.batch:
        print(f"batch {rows}, ms a token")
        prompts = ids[:rows, : args.context]
        show("teacher, eager", generate_time(model, prompts, args.tokens)[0])
        if args.compiled_teacher:
            compiled, _ = generate_time(model, prompts, args.tokens, cache_implementation="static")
            show("teacher, compiled static cache", compiled)
    lolcats.convert(model, lolcats.load_config(args.recipe).linearization, input_ids=ids[:1])
    for rows in args.batch:
        print(f"batch {rows}, ms a token")
        measure(model, ids[:rows, : args.context], args.tokens)


if __name__ == "__main__":
    main()
