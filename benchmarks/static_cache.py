"""Milliseconds a token of `generate` with the default cache and with a static one, which a GPU runs as CUDA graphs.

python benchmarks/static_cache.py [--device cuda] [--layers 30] [--tokens 200]

A Llama of SmolLM2-135M's shape with random weights, float32, window 64, 4 sinks, two prompts of 200 tokens. The
time is the difference of two runs, so that reading the prompt and compiling do not count.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lolcats
from lolcats.models.device import describe_device


def build(layers: int, device: torch.device) -> Any:
    """The linearized model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, initializer_range=0.05, pad_token_id=0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None  # texts of a fixed length
    return lolcats.convert(model, lolcats.LinearizationConfig(sinks=4))


def timed(model: Any, ids: torch.Tensor, tokens: int, **options: Any) -> tuple[torch.Tensor, float]:
    """The text and the seconds that it took."""
    start = time.perf_counter()
    mask = torch.ones_like(ids)
    text = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, **options)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return text, time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    device = torch.device(args.device)
    model = build(args.layers, device)
    ids = torch.randint(3, 1000, (2, 200), generator=torch.Generator().manual_seed(0)).to(device)
    texts, half = [], args.tokens // 2
    print(describe_device(device))
    for name, options in (("default", {}), ("static", {"cache_implementation": "static"})):
        timed(model, ids, args.tokens, **options)
        text, whole = timed(model, ids, args.tokens, **options)
        _, part = timed(model, ids, half, **options)
        texts.append(text)
        print(f"{name} cache: {1e3 * (whole - part) / (args.tokens - half):.2f} ms a token")
    print(f"same tokens: {bool(torch.equal(*texts))}")


if __name__ == "__main__":
    main()
