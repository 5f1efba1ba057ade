"""The process of an engine: vLLM gives memory back only when its process ends, so each model has one of its own."""

# pyright: reportMissingImports=false
# vLLM is not installed where the rest of the package is checked.

from __future__ import annotations

import gc
import os
import signal
import statistics
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from lolcats.errors import LolcatsError
from lolcats.evaluation.speed.measure import EAGER, GRAPH, Times
from lolcats.printable import reason

COMPILED, PIECES = "compiled", "graphs of pieces"
"""How steps run, beside GRAPH and EAGER: compiled without graphs, or graphs of what lies between the attention."""
SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
"""For vLLM's environment: no report to its maker; contexts were checked before; the engine works in this process, whose
pages can then be counted; and tables are not mixed with its logs."""


class Case(NamedTuple):
    """What is measured at once."""

    batch: int
    context: int
    """Tokens of each prompt."""
    lead: int
    """Tokens that are decoded before those that count, so that all texts are read."""


@dataclass(frozen=True)
class Order:
    """What an engine is to measure."""

    arguments: dict[str, Any]
    """Of `vllm.LLM`."""
    cases: tuple[Case, ...]
    tokens: int
    """Decoded for one measurement."""
    repeat: int
    vocabulary: int
    device: str = "cpu"


class Found(NamedTuple):
    """Of one case."""

    times: Times
    attention: str
    """Name of vLLM's attention; "" where a model has none."""
    fit: int
    """Texts of this length that the engine's pages have room for."""


class Failure(NamedTuple):
    """Why there is no more."""

    reason: str


def run_engine(order: Order, sender: Connection) -> None:
    """Send a `Found` for each case, or a `Failure`; in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this ends it
    os.dup2(2, 1)  # the rows of a table go to the other process's stdout
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        for found in measure(order):
            sender.send(found)
    except Exception as error:
        if not isinstance(error, ValueError):
            traceback.print_exc()
        sender.send(Failure(explain(error)))


def explain(error: Exception) -> str:
    """What an engine's exception says, in a line; pydantic wraps what the plugin says."""
    problems = error.errors() if hasattr(error, "errors") else []  # type: ignore[attr-defined]
    if problems:
        return str(problems[0]["msg"]).removeprefix("Value error, ")
    return reason(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {reason(error)}"


def measure(order: Order) -> Iterator[Found]:
    """What `run_engine` sends; it takes this process's memory.

    Raises:
        LolcatsError: vLLM is another device's, or a step is too short to be timed.
        ValueError: vLLM or the plugin refuses the model or the settings.
    """
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.device_type != order.device:
        raise LolcatsError(f"vLLM was built for {current_platform.device_type}, and {order.device} was asked for")
    gc.freeze()  # what is imported is a million objects, and vLLM has garbage collected often
    llm = LLM(**order.arguments)
    config = llm.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    backends = [layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")]
    steps = steps_of(config)
    for case in order.cases:
        times, fit = _times(llm, case, order)
        times.steps = "" if times.step is None else steps
        yield Found(times, backends[0] if backends else "", fit)
    llm.llm_engine.engine_core.shutdown()


def steps_of(vllm_config: Any) -> str:
    """How decoding steps run with these settings."""
    mode = vllm_config.compilation_config.cudagraph_mode.decode_mode().name
    if mode == "NONE":
        return EAGER if vllm_config.model_config.enforce_eager else COMPILED
    return GRAPH if mode == "FULL" else PIECES


def _times(llm: Any, case: Case, order: Order) -> tuple[Times, int]:
    """Medians over rounds with prompts of their own, after one that counts pages; and how many texts fit."""
    short = case.lead
    pages = count_pages(llm, _prompts(case, order, 0), short + order.tokens)
    if not pages.at_once:
        return Times(memory=pages.text_bytes), pages.fit
    first, step = [], []
    for number in range(order.repeat):
        prompts = _prompts(case, order, number + 1)
        first.append(_seconds(llm, prompts, 1))
        step.append((_seconds(llm, prompts, short + order.tokens) - _seconds(llm, prompts, short)) / order.tokens)
    if (median := statistics.median(step)) <= 0:
        raise LolcatsError(
            f"{order.tokens} tokens of {case.batch} texts take less than what the time of reading them varies by; "
            "decode more for a measurement (tokens), or measure more often (repeat)"
        )
    return Times(statistics.median(first), median, memory=pages.text_bytes), pages.fit


def _prompts(case: Case, order: Order, seed: int) -> list[Any]:
    """Random tokens."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, order.vocabulary, (case.batch, case.context), generator=random)
    return [{"prompt_token_ids": text} for text in ids.tolist()]


def _sampling(tokens: int) -> Any:
    """The likeliest tokens, so many."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def _seconds(llm: Any, prompts: list[Any], tokens: int) -> float:
    start = time.perf_counter()
    llm.generate(prompts, _sampling(tokens), use_tqdm=False)
    return time.perf_counter() - start


class Pages(NamedTuple):
    """What texts take of the memory that vLLM hands out."""

    text_bytes: float
    """Of one text, on each device."""
    fit: int
    """Texts that there is room for."""
    at_once: bool
    """Whether all that were asked for were there together, and none had to make room for another."""


def count_pages(llm: Any, prompts: list[Any], tokens: int) -> Pages:
    """Have texts written, and look after each step which pages are given out."""
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    config, pool = scheduler.kv_cache_config, scheduler.kv_cache_manager.block_pool
    room, most, texts, ousted = pool.get_num_free_blocks(), 0, 0, False
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, _sampling(tokens))
    while engine.has_unfinished_requests():
        engine.step()
        running, waiting = scheduler.get_request_counts()
        ousted = ousted or (texts == len(prompts) and waiting > 0)
        if running >= texts:
            texts, most = running, max(most, room - pool.get_num_free_blocks())
    page = config.kv_cache_tensors[0].size / config.num_blocks  # all of them lie in one piece of memory of this size
    fit = room * texts // most
    return Pages(page * most / texts, min(fit, texts - 1) if ousted else fit, texts == len(prompts) and not ousted)
