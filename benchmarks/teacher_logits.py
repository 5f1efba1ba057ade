"""What `finetune.teacher_logits` changes: seconds a step, bytes on disk, and the loss, for several k.

python benchmarks/teacher_logits.py [--model demo] [--recipe recommended] [--device cuda] [--length 512]
    [--sequences 2] [--steps 3] [--k 16 64 256]

The steps are those of stage 2 with KL alone, LoRA and the same sequences of python-docs, after one that is not counted;
seconds are the least of them. The divergence is that of the layers as they start, on the same sequences. --model
llama-3-8b-shape is a Llama of the sizes of Llama 3 8B with random weights, of which only the seconds mean something.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

import lolcats
from lolcats.config import FinetuneConfig
from lolcats.evaluation.compare import read_segments
from lolcats.models.device import describe_device
from lolcats.models.shapes import SHAPES, random_model
from lolcats.models.teacher import load_teacher
from lolcats.printable import show_bytes
from lolcats.training import FinetuneStage
from lolcats.training.batches import Batch
from lolcats.training.teacher_logits import keys_of


def batches(args: argparse.Namespace, model: PreTrainedModel) -> list[Batch]:
    """One a step, and one before."""
    shape = (args.steps + 1) * args.sequences, args.length
    if args.model in SHAPES:
        ids = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(0))
    else:
        tokenizer = load_teacher(args.model, device="cpu")[1]
        ids = read_segments(["python-docs"], None, tokenizer, None, args.length, shape[0])
    ids = ids.to(model.device)
    return [Batch(some, torch.ones_like(some, dtype=torch.bool), None, None) for some in ids.split(args.sequences)]


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(stage: FinetuneStage, todo: list[Batch], device: torch.device) -> float:
    """Of the fastest step but the first."""
    times: list[float] = []
    for batch in todo:
        wait(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            stage.backward(batch, 1.0)
        wait(device)
        times.append(time.perf_counter() - start)
    for p in stage.parameters().values():
        p.grad = None
    return min(times[1:])


def measure(model: PreTrainedModel, todo: list[Batch], k: int | None, device: torch.device) -> None:
    """Print a row."""
    logits = {} if k is None else {"teacher_logits": {"cache": "topk", "k": k}}
    settings = {"kl_factor": 1.0, "cross_entropy_factor": 0.0, **logits}
    stage = FinetuneStage(model, FinetuneConfig.model_validate(settings))
    size, computed = "", 0.0
    if (cache := stage.logits) is not None:
        start = time.perf_counter()
        for batch in todo:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                cache.add(keys_of(batch.input_ids.cpu().numpy(), None), stage.teacher_top(batch))
        cache.flush()
        computed = (time.perf_counter() - start) / len(todo)
        cache.scan()
        tokens = len(todo) * todo[0].tokens
        size = show_bytes(sum(f.stat().st_size for f in cache.folder.glob("*.safetensors")) / tokens)
    with torch.no_grad():
        kl = float(np.mean([float(stage.validate(batch)["kl"]) for batch in todo]))
    step = seconds(stage, todo, device)
    stage.finish()  # the adapters do nothing at their start
    print(f"| {'all' if k is None else k} | {step:.2f} | {computed:.2f} | {size} | {kl:.5f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--recipe", default="recommended")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64, 256])
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random = args.model in SHAPES
    model = random_model(args.model, dtype, device) if random else load_teacher(args.model, dtype, device)[0]
    todo = batches(args, model)
    layers = lolcats.load_config(args.recipe).linearization
    lolcats.convert(model, layers.without_text() if random else layers, input_ids=todo[0].input_ids, seed=0)
    print(
        f"{args.model}, {args.recipe}, {args.sequences} x {args.length}, {describe_device(device)}, {torch.__version__}"
    )
    print("| k | s a step | s to compute, a step | bytes a token | KL |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOLCATS_CACHE"] = str(Path(folder) / "cache")
        for k in (None, *args.k):
            measure(model, todo, k, device)


if __name__ == "__main__":
    main()
