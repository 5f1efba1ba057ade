"""Tokens a second and peak memory of stage 1 by blocks: one block of a large model, or several side by side.

    python benchmarks/blocks.py --recipe configs/llama3_70b.yaml --model llama-3-70b-shape --folder /scratch
    python benchmarks/blocks.py --model llama-3-8b-shape --size 8 --side-by-side 2 --folder /scratch

Only the layers of a block are made, with random weights and on their device; the stream in front of the first block is
random too, and read from the disk. Side by side, each GPU trains one block, from what the one before it writes. The
loop is that of real runs, without questions, and every block writes what it gives. Kernels are compiled in two steps
that are not counted. A block alone is trained once more with nothing read or written, which leaves its own time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

import lolcats
from lolcats.config import TransferConfig
from lolcats.data import PackedDataset
from lolcats.modeling.convert import put_in_layers
from lolcats.models.block import Block, Part
from lolcats.models.device import describe_device
from lolcats.models.layers import decoder_layers
from lolcats.models.shapes import config_of, random_model
from lolcats.training import Reporter, TrainingData, train
from lolcats.training.blocks.hidden import NAME, Sink, Stored
from lolcats.training.blocks.order import Order
from lolcats.training.blocks.stage import BlockStage, Passage
from lolcats.training.blocks.store import HiddenStore

VOCABULARY = 512
"""Of embeddings, which are not what is measured."""
WARM = 2
"""Steps that are not counted."""


def make_block(source: str, size: int, device: torch.device) -> Block:
    """`size` layers behind one that hands on what is given to it."""
    config = config_of(source)
    config.num_hidden_layers, config.vocab_size = size + 1, VOCABULARY
    config.bos_token_id = config.eos_token_id = None
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        model = random_model(folder, torch.bfloat16, device)
    decoder_layers(model)[1][0].to("meta")
    return Block(model, Part(1, size + 1))


def random_text(sequences: int, length: int) -> TrainingData:
    """Sequences to train on, and one to validate on."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (sequences + 1, length), dtype=np.int32)
    text = PackedDataset(ids, np.ones_like(ids, dtype=bool), np.zeros_like(ids))
    return TrainingData(text[1:], text[:1])


def write_stream(folder: Path, order: Order, length: int, width: int) -> float:
    """The stream in front of the first block; GB/s until all of it is on the disk."""
    held, begun = torch.randn(order.size, length, width).bfloat16(), time.perf_counter()
    with HiddenStore(folder, {}) as store:
        for place in order.places:
            store.write(place, {NAME: held[: order.rows(place)]})
    return held.numel() * 2 * len(order.training) / (time.perf_counter() - begun) / 1e9


class InMemory:
    """The source of a stream that is on the device, the same for every batch."""

    def __init__(self, order: Order, length: int, width: int) -> None:
        self.held = torch.randn(order.size, length, width, device=order.device, dtype=torch.bfloat16)

    def read(self, place: str) -> Tensor:
        return self.held


def measure(
    block: Block, config: TransferConfig, order: Order, folder: Path, args: argparse.Namespace, stored: bool
) -> dict[str, float]:
    """Train a block, from the boundary in front of it to the next one, or from nothing `stored`."""
    rank, width = args.rank, block.model.config.hidden_size
    accelerator = Accelerator(cpu=order.device == torch.device("cpu"))
    with ExitStack() as stack:
        before, behind = (stack.enter_context(HiddenStore(folder / f"boundary-{n}", {})) for n in (rank, rank + 1))
        source = Stored(before, order, lambda: None) if stored else InMemory(order, args.length, width)
        passage = Passage(block, order, source, Sink(behind if stored else None))
        checkpoints, begun = folder / f"checkpoints-{rank}", time.perf_counter()
        result = train(
            BlockStage(passage, config), config, order.data, checkpoints, Reporter(), accelerator=accelerator, seed=0,
            autocast=torch.bfloat16,
        )  # fmt: skip
        behind.flush()
    return {"tokens_per_second": result.tokens_per_second, "seconds_in_all": time.perf_counter() - begun}


def run_rank(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All that one process does."""
    device = torch.device("cpu" if args.cpu else "cuda")
    torch.set_float32_matmul_precision("high")
    recipe = lolcats.load_config(args.recipe)
    block = make_block(args.model, args.size or recipe.transfer.blocks.size or 1, device)
    put_in_layers(block.model, recipe.linearization.without_text())
    row: dict[str, Any] = {}
    phases = [("warm", WARM), ("timed", args.steps), ("alone", args.steps)]
    for name, steps in phases[: 2 if args.side_by_side > 1 else 3]:
        config = _settings(args, recipe.transfer, steps)
        order = Order(config, random_text(steps * config.batch_size, args.length), 0, device)
        ready, place = folder / f"{name}.{args.rank}", folder / name
        if args.rank == 0 and name != "alone":
            row["written_gb_per_second"] = write_stream(
                place / "boundary-0", order, args.length, block.model.config.hidden_size
            )
        ready.touch()  # all begin together
        while not all((folder / f"{name}.{other}").exists() for other in range(args.side_by_side)):
            time.sleep(0.01)
        found = measure(block, config, order, place, args, stored=name != "alone")
        row |= {f"alone_{key}": value for key, value in found.items()} if name == "alone" else found
    if device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row | {"device": describe_device(device)}


def _settings(args: argparse.Namespace, config: TransferConfig, steps: int) -> TransferConfig:
    """Those of the recipe, for so many steps."""
    batch = args.sequences or config.batch_size
    micro, recall = args.micro or config.micro_batch_size, config.recall.model_copy(update={"share": 0.0})
    return config.model_copy(
        update={"tokens": steps * batch * args.length, "batch_size": batch, "micro_batch_size": micro,
                "cuda_graph": False, "recall": recall, "validate_every": 10**6, "checkpoint_every": 10**6}
    )  # fmt: skip


def start_ranks(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A process for each block, on GPUs of their own."""
    ranks = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--rank", str(rank), "--inside", str(folder)],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(args.side_by_side)
    ]  # fmt: skip
    return [json.loads(rank.communicate()[0].splitlines()[-1]) for rank in ranks]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="paper", help="a shipped recipe or a YAML file")
    parser.add_argument("--model", default="llama-3-8b-shape", help="a name of lolcats.models.shapes, or a folder")
    parser.add_argument("--size", type=int, help="layers of a block; as the recipe has it without")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sequences", type=int, help="of a step; as the recipe has it without")
    parser.add_argument("--micro", type=int, help="sequences at once; as the recipe has it without")
    parser.add_argument("--side-by-side", type=int, default=1, help="blocks, each on a GPU of its own")
    parser.add_argument("--folder", type=Path, help="on the disk for hidden states; a temporary one without it")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        print(json.dumps(run_rank(args, args.inside)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = start_ranks(args, Path(folder))
    for number, row in enumerate(rows):
        told = (f"{name} {value:,.2f}" if isinstance(value, float) else str(value) for name, value in row.items())
        print(f"block {number}: {', '.join(told)}")
    if args.json:
        arguments = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"arguments": arguments, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
