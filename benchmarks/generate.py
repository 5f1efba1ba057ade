"""Milliseconds a token of a linearized model with and without CUDA graphs, beside its teacher.

python benchmarks/generate.py [--model demo] [--recipe recommended] [--device cuda] [--batch 1 64] [--context 512]
    [--tokens 32] [--compiled-teacher]

The layers are those of a recipe, untrained. `generate` is the time of a token in `generate`, the difference of two
texts, so that reading the prompt does not count; `steps` is that of a forward pass alone, the GPU's work awaited at the
end.
The teacher's graph is a recording of its step with a static cache; --compiled-teacher also has `generate` compile it.
--model llama-3-8b-shape is a Llama of the sizes of Llama 3 8B with random weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from shapes import load
from torch import Tensor
from transformers import DynamicCache, StaticCache

import lolcats
from lolcats.modeling import state_bytes
from lolcats.modeling.decode_graphs import graphs_of, record_cuda
from lolcats.models.device import describe_device

WARM = 4
"""Steps before the clock starts: kernels are compiled and steps recorded in them."""


def wait(ids: Tensor) -> None:
    """Wait for the GPU."""
    if ids.is_cuda:
        torch.cuda.synchronize()


def generate_time(model: Any, ids: Tensor, tokens: int, **options: Any) -> tuple[float, Tensor]:
    """Milliseconds a token, and the longer text."""
    times, text = [], ids
    for new in (WARM, tokens // 2, tokens):
        wait(ids)
        start = time.perf_counter()
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options)
        wait(ids)
        times.append(time.perf_counter() - start)
    return 1e3 * (times[2] - times[1]) / (tokens - tokens // 2), text


def step_time(step: Callable[[], Any], ids: Tensor, tokens: int) -> float:
    """Milliseconds a call."""
    for _ in range(WARM):
        step()
    wait(ids)
    start = time.perf_counter()
    for _ in range(tokens):
        step()
    wait(ids)
    return 1e3 * (time.perf_counter() - start) / tokens


@torch.no_grad()
def cached_step(model: Any, ids: Tensor, cache: Any) -> Callable[[], Any]:
    """A step of a model after a prompt."""
    model(ids, past_key_values=cache, logits_to_keep=1)
    token = ids[:, :1].clone()
    return lambda: model(token, past_key_values=cache)


def show(name: str, *cells: str) -> None:
    """Print a row."""
    print(f"{name:36}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


@torch.no_grad()
def measure_teacher(model: Any, ids: Tensor, tokens: int, compiled: bool) -> None:
    """Print the rows of the model before its conversion, for prompts [B, N]."""
    alone = step_time(cached_step(model, ids, DynamicCache(config=model.config)), ids, tokens)
    show("teacher, eager", f"{generate_time(model, ids, tokens)[0]:.2f}", f"{alone:.2f}")
    if ids.is_cuda:
        show("teacher, graph of a static cache", "", teacher_graph(model, ids, tokens))
    if compiled:
        options = {"cache_implementation": "static"}
        show("teacher, compiled static cache", f"{generate_time(model, ids, tokens, **options)[0]:.2f}", "")


@torch.no_grad()
def measure(model: Any, ids: Tensor, tokens: int) -> None:
    """Print the rows of a linearized model."""
    texts, graphs, cache = [], graphs_of(model), DynamicCache(config=model.config)
    for name, enabled in (("linearized, eager", False), ("linearized, graphs", True)):
        lolcats.set_decode_graphs(model, enabled)
        cache = DynamicCache(config=model.config)
        alone = step_time(cached_step(model, ids, cache), ids, tokens)
        written, text = generate_time(model, ids, tokens)
        texts.append(text[:, ids.shape[1] :])
        show(name, f"{written:.2f}", f"{alone:.2f}")
    if ids.is_cuda and not graphs.recordings:
        print("no step was replayed: a warning above says why")
    same = float((texts[0] == texts[1]).float().mean())
    print(f"{same:.1%} of the tokens are the same; {state_bytes(cache) / len(ids) / 2**20:.2f} MiB of state a text")


def teacher_graph(model: Any, ids: Tensor, tokens: int) -> str:
    """Milliseconds of a replay of the teacher's step, or why there is none."""
    room = ids.shape[1] + tokens + 3 * WARM
    step = cached_step(model, ids, StaticCache(config=model.config, max_cache_len=room))
    try:
        for _ in range(WARM):
            step()
        _, replay = record_cuda(step)
    except RuntimeError as error:
        return f"not recorded: {str(error).splitlines()[0]}"
    return f"{step_time(replay, ids, tokens):.2f}"


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
    model = load(args.model, device).eval()
    model.generation_config.eos_token_id = None  # texts of a fixed length
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (max(args.batch), max(args.context, 1024)), generator=random).to(device)
    print(
        f"{describe_device(device)}, torch {torch.__version__}: {args.model}, {args.recipe}, {args.context} tokens read"
    )
    for rows in args.batch:
        show(f"batch {rows}, ms", "generate", "steps")
        measure_teacher(model, ids[:rows, : args.context], args.tokens, args.compiled_teacher)
    lolcats.convert(model, lolcats.load_config(args.recipe).linearization, input_ids=ids[:1])
    for rows in args.batch:
        show(f"batch {rows}, ms", "generate", "steps")
        measure(model, ids[:rows, : args.context], args.tokens)


if __name__ == "__main__":
    main()
