"""Tokens a second and peak memory of stage 2 with sharded weights, on as many processes as are started, against one.

    torchrun --nproc-per-node 8 benchmarks/scale.py --model llama-3-8b-shape --checkpointing --json scale.json

Weights are random and made where they belong, so no machine needs memory for a whole model, unless one process is to be
compared with (--against-one), which holds it whole on its device. Each process reads as many sequences, however many
there are.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import lolcats
from lolcats.config import FinetuneConfig
from lolcats.models.device import describe_device
from lolcats.models.shapes import config_of, random_model
from lolcats.models.sharded import shard
from lolcats.training import FinetuneStage
from lolcats.training.batches import Batch
from lolcats.training.gradients import clip_gradients, reduce_gradients
from lolcats.training.sharding import ensure_group

WARM = 2
"""Steps that are not counted."""


def sharded_model(source: str, settings: FinetuneConfig, device: torch.device) -> PreTrainedModel:
    """A model with random weights, sharded over all processes; process 0 makes them one by one."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config_of(source), dtype=torch.bfloat16, trust_remote_code=False)
    model.tie_weights()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    generator = torch.Generator(device).manual_seed(0)

    def make(name: str) -> Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], dtype=torch.bfloat16, device=device)
        return torch.empty(shapes[name], dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)

    own = make if torch.distributed.get_rank() == 0 else None
    offload = settings.sharding.cpu_offload
    return shard(model, own, device, trained=settings.method == "full", cpu_offload=offload).eval()


def measure(model: PreTrainedModel, settings: FinetuneConfig, accelerator: Accelerator, args: Any) -> dict[str, Any]:
    """Tokens a second of a process, and the most memory that it took."""
    device = accelerator.device
    recipe = lolcats.load_config(args.recipe)
    lolcats.convert(model, recipe.linearization.without_text(), seed=0)  # no text here to start from
    stage = FinetuneStage(model, settings)
    trained = list(stage.parameters().values())
    optimizer = torch.optim.AdamW(trained, lr=1e-5, foreach=False)
    ids = torch.randint(0, 90, (args.sequences, args.length)).to(device)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), None, None)
    start = 0.0
    for step in range(WARM + args.steps):
        if step == WARM:
            _wait(device)
            start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            stage.backward(batch, 1.0 / accelerator.num_processes)
        reduce_gradients(trained, accelerator)
        clip_gradients(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    _wait(device)
    seconds = time.perf_counter() - start
    return {"tokens_per_second": args.steps * ids.numel() / seconds, "peak_gib": _peak(device)}


def against_one(settings: FinetuneConfig, accelerator: Accelerator, args: Any) -> dict[str, Any]:
    """The same in process 0 alone, with whole weights."""
    found: dict[str, Any] = {}
    if accelerator.is_main_process:
        alone = Accelerator(cpu=accelerator.device.type == "cpu")
        model = random_model(args.model, torch.bfloat16, accelerator.device)
        found = measure(model, settings, _Alone(alone), args)  # type: ignore[arg-type]
        del model
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    accelerator.wait_for_everyone()
    return found


class _Alone:
    """An accelerator as it would be in one process."""

    num_processes = 1

    def __init__(self, accelerator: Accelerator) -> None:
        self.device = accelerator.device


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> float:
    """GiB of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="hybrid", help="a shipped recipe or a YAML file: its layers")
    parser.add_argument("--model", default="llama-3-8b-shape", help="a name of lolcats.models.shapes, or a folder")
    parser.add_argument("--method", default="lora", choices=["lora", "full"])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=1, help="of each process in a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true", help="compute decoder layers twice")
    parser.add_argument("--offload", action="store_true", help="keep frozen weights in the memory of the CPU")
    parser.add_argument("--against-one", action="store_true", help="measure process 0 alone before")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    accelerator = Accelerator(cpu=args.cpu)
    torch.set_float32_matmul_precision("high")
    common = {"method": args.method, "gradient_checkpointing": args.checkpointing}
    rows: dict[str, Any] = {}
    if args.against_one or accelerator.num_processes == 1:
        rows["whole, 1 process"] = against_one(FinetuneConfig(**common), accelerator, args)
    if accelerator.num_processes > 1 or args.offload:
        ensure_group(accelerator)
        settings = FinetuneConfig(**common, sharding={"enabled": True, "cpu_offload": args.offload})  # type: ignore[arg-type]
        indexed = accelerator.device if args.cpu else torch.device("cuda", torch.cuda.current_device())
        model = sharded_model(args.model, settings, indexed)
        kind = "in the host's memory" if args.offload else "sharded"
        rows[f"{kind}, {accelerator.num_processes} processes"] = measure(model, settings, accelerator, args)
    if accelerator.is_main_process:
        where = f"{describe_device(accelerator.device)}, torch {torch.__version__}"
        print(f"{args.model}, {args.method}, {args.sequences} x {args.length} tokens a process, {where}")
        for name, row in rows.items():
            print(f"{name}: {row['tokens_per_second']:,.0f} tokens/s a process, peak {row['peak_gib']:.2f} GiB")
        if args.json:
            args.json.write_text(json.dumps({"arguments": vars(args) | {"json": None}, "where": where, "rows": rows}))
    accelerator.end_training()


if __name__ == "__main__":
    main()
