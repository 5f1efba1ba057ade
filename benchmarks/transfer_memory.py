"""Memory of a stage 1 step beyond the weights, for models of different depth: it should not grow with the layers.

    python benchmarks/transfer_memory.py [--layers 8 30] [--tokens 2048]

Counts the bytes that autograd holds at once (saved tensors), and the gradients and parameters that it trains.
"""

from __future__ import annotations

import argparse
import weakref

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lolcats
from lolcats.config import TransferConfig
from lolcats.training import TransferStage
from lolcats.training.batches import Batch


def peak_saved_bytes(layers: int, tokens: int) -> int:
    """Largest number of bytes saved for backward at one time during a step of attention transfer."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1000,
    )
    model = lolcats.convert(LlamaForCausalLM(config), lolcats.LinearizationConfig(sinks=4))
    stage = TransferStage(model, TransferConfig())
    ids = torch.randint(0, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    alive, peak = 0, 0

    def release(size: int) -> None:
        nonlocal alive
        alive -= size

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal alive, peak
        held = tensor.detach()
        size = held.untyped_storage().nbytes()
        alive += size
        peak = max(peak, alive)
        weakref.finalize(held, release, size)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stage.backward(Batch(ids, torch.ones_like(ids, dtype=torch.bool), None, None), 1.0)
    return peak


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 30])
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    for layers in args.layers:
        peak = peak_saved_bytes(layers, args.tokens)
        print(f"{layers:>3} layers: {peak / 2**20:,.1f} MiB held for backward at the peak")


if __name__ == "__main__":
    main()
