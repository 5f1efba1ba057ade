"""Perplexity of a model that keeps a plain window: softmax over the last tokens and the sinks, nothing trained.

python benchmarks/plain_window.py --sources TEXT [--model demo] [--window 454] [--sinks 4] [--length 2048] [--last 1024]
    [--max-segments N] [--dtype bfloat16]

It is the control of equal memory: 454 + 4 keys and values of SmolLM2-135M take the bytes of a linearized layer's state
(docs/math.md). The teacher is measured beside it.
"""

from __future__ import annotations

import argparse

import torch

from lolcats import LinearizationConfig, RunConfig, convert, load_teacher
from lolcats.config import DataConfig, EvaluationConfig
from lolcats.evaluation import evaluation_segments, measure, teacher_variants
from lolcats.models.device import describe_device


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--sources", nargs="+", required=True)
    parser.add_argument("--window", type=int, default=454)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--last", type=int, default=1024)
    parser.add_argument("--max-segments", type=int)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    model, tokenizer = load_teacher(args.model, dtype=getattr(torch, args.dtype), device=args.device)
    convert(model, LinearizationConfig(window=args.window, sinks=args.sinks, start="paper"))
    text = EvaluationConfig(sources=args.sources, segment_length=args.length, max_segments=args.max_segments)
    segments = evaluation_segments(RunConfig(data=DataConfig(), evaluation=text), tokenizer, None)
    variants = teacher_variants(model)
    found = measure(variants, segments, teacher=variants["teacher"], last=args.last, batch_size=1)
    print(f"{describe_device(torch.device(args.device))}, torch {torch.__version__}, {len(segments)} x {args.length}")
    for name, label in (("teacher", "teacher"), ("training_free", f"window {args.window} + {args.sinks} sinks")):
        print(f"{label}: perplexity {found[name].perplexity:.2f}, KL {found[name].kl:.3f}")


if __name__ == "__main__":
    main()
