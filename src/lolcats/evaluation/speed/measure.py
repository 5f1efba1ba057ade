"""Reading a prompt and decoding after it, timed as `generate` does them: forward passes of the model with its cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from lolcats.errors import is_out_of_memory
from lolcats.evaluation.speed.clock import release, seconds
from lolcats.modeling import linearized_layers
from lolcats.modeling.cache_contents import cache_bytes
from lolcats.modeling.decode_graphs import graphs_of
from lolcats.modeling.head import FAILURES
from lolcats.modeling.recorders import Recorder
from lolcats.models.generation import piece_of

WARM = 3
"""Steps before the clock starts: kernels are compiled and steps recorded in them."""
AT_ONCE = 8192
"""Tokens of all texts that are read at once where there is no memory to read them as `generate` does."""
GRAPH, UNFUSED, EAGER = "graph", "unfused graph", "eager"
T = TypeVar("T")


@dataclass
class Times:
    """Of one batch and context; None is out of memory."""

    first_token: float | None = None
    """Seconds from the prompts to the first token of each."""
    step: float | None = None
    """Seconds of a decoding step, which gives one more token of each text."""
    steps: str = ""
    """How the steps ran: GRAPH, UNFUSED where fused kernels were not recorded, or EAGER; of other engines in their
    words."""
    memory: float | None = None
    """Bytes a text while decoding, weights not counted: the peak on a GPU, elsewhere what the cache holds; of engines
    with pages what these take."""
    reading_memory: float | None = None
    """The same at the peak of reading the prompts; None where that is not counted."""


@torch.no_grad()
def measure_times(
    model: PreTrainedModel, batch: int, context: int, tokens: int, repeat: int, record: Recorder | None = None
) -> Times:
    """Medians over `repeat` rounds, each with prompts of its own, after one that does not count.

    Softmax attention is decoded eagerly and, where steps can be recorded, by a recording with a static cache; the
    faster one counts.

    Args:
        model: linearized or not, in evaluation.
        batch, context: prompts, and tokens of each.
        tokens: to decode in a round.
        repeat: rounds.
        record: of a step of softmax attention; None leaves recordings out.
    """
    device, linearized = model.device, bool(linearized_layers(model))
    if linearized:
        graphs_of(model).clear()
    release(device)
    found = _unless_full(lambda: _dynamic(model, (batch, context), tokens, repeat), device) or Times()
    if linearized or record is None:
        return found
    recorder = record
    with _recordable(model):
        other = _unless_full(lambda: _static(model, (batch, context), tokens, repeat, recorder), device)
    if other is not None and (found.step is None or (other.step or found.step) < found.step):
        found.step, found.steps, found.memory = other.step, other.steps, other.memory
    return found


def _unless_full(run: Callable[[], T], device: torch.device) -> T | None:
    """What a call returns; None where there is no memory for it, which is then free again."""
    try:
        return run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release(device)
    return None


class _Memory:
    """What is allocated beyond what was there before, a text."""

    def __init__(self, device: torch.device, batch: int) -> None:
        self.device, self.batch = device, batch
        self.counts = device.type == "cuda"
        self.before = torch.cuda.memory_allocated(device) if self.counts else 0

    def begin(self) -> None:
        """Forget earlier peaks."""
        if self.counts:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float | None:
        """Since then; None where it is not counted."""
        if not self.counts:
            return None
        return (torch.cuda.max_memory_allocated(self.device) - self.before) / self.batch


def _dynamic(model: PreTrainedModel, shape: tuple[int, int], tokens: int, repeat: int) -> Times:
    """With the cache that `generate` uses by default, and by graphs where the model has them."""
    graphs, memory = graphs_of(model) if linearized_layers(model) else None, _Memory(model.device, shape[0])
    before = 0 if graphs is None else graphs.replays
    rounds = [_round(model, _prompts(model, shape, 0), tokens, True, memory)]
    whole = rounds[0].first_token is not None
    if whole or rounds[0].step is not None:
        rounds += [_round(model, _prompts(model, shape, number + 1), tokens, whole, memory) for number in range(repeat)]
    found = rounds[-1]
    found.first_token = _median([one.first_token for one in rounds[1:]])
    found.step = _median([one.step for one in rounds[1:]])
    if found.step is not None:
        found.steps = EAGER
        if graphs is not None and graphs.replays > before:
            found.steps = UNFUSED if graphs.recordings[0].unfused else GRAPH
    return found


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known and len(known) == len(values) else None


def _round(model: PreTrainedModel, ids: Tensor, tokens: int, whole: bool, memory: _Memory) -> Times:
    """Read prompts [B, N], as ever where `whole` and there is memory for it, else little by little; and decode."""
    times, device = Times(), ids.device
    memory.begin()
    read = _unless_full(lambda: _read_whole(model, ids), device) if whole else None
    if read is not None:
        times.first_token, times.reading_memory = read[1], memory.peak()

    def decode() -> None:
        cache = DynamicCache(config=model.config) if read is None else read[0]
        if read is None:
            _read(model, ids, cache, max(1, AT_ONCE // len(ids)))
        step = _stepping(model, ids[:, -1:].clone(), cache)
        _repeat(step, WARM)
        memory.begin()
        times.step = seconds(lambda: _repeat(step, tokens), device) / tokens
        peak = memory.peak()
        times.memory = cache_bytes(cache) / len(ids) if peak is None else peak

    _unless_full(decode, device)
    return times


def _read_whole(model: PreTrainedModel, ids: Tensor) -> tuple[DynamicCache, float]:
    """A cache of prompts [B, N], read as `write_tokens` has them read, and the seconds until the first token."""
    cache = DynamicCache(config=model.config)
    piece = piece_of(model, len(ids)) if linearized_layers(model) else ids.shape[1]
    return cache, seconds(lambda: _read(model, ids, cache, piece).argmax(-1), ids.device)


def _static(model: PreTrainedModel, shape: tuple[int, int], tokens: int, repeat: int, record: Recorder) -> Times | None:
    """Decoding by a recording with a static cache; None where the model's step cannot be recorded."""
    device, memory, taken = model.device, _Memory(model.device, shape[0]), list[float]()
    # Room for the steps before the recording and in it, for those before the clock starts, and for those that count.
    cache = StaticCache(config=model.config, max_cache_len=shape[1] + 2 * WARM + tokens + 1)
    ids, piece = _prompts(model, shape, 0), max(1, AT_ONCE // shape[0])
    try:
        _read(model, ids, cache, piece)
        step = _stepping(model, ids[:, -1:].clone(), cache)
        _repeat(step, WARM)
        _, replay = record(cast(Any, step))
        for number in range(repeat):
            if number:
                cache.reset()
                _read(model, ids, cache, piece)
            _repeat(replay, WARM)
            memory.begin()
            taken.append(seconds(lambda: _repeat(replay, tokens), device) / tokens)
    except FAILURES as error:
        if is_out_of_memory(error):
            raise
        return None
    peak = memory.peak()
    held = cache_bytes(cache) / shape[0] if peak is None else peak
    return Times(step=statistics.median(taken), steps=GRAPH, memory=held)


@contextmanager
def _recordable(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a step with a static cache can be recorded: its GPU is the current one, and SDPA stands in for
    FlashAttention, which cannot leave out what the cache has not filled yet.
    """
    attention = str(model.config._attn_implementation)
    with torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext():
        if not attention.startswith("flash"):
            yield
            return
        model.set_attn_implementation("sdpa")
        try:
            yield
        finally:
            model.set_attn_implementation(attention)


def _prompts(model: PreTrainedModel, shape: tuple[int, int], seed: int) -> Tensor:
    """Random tokens [B, N]."""
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, shape, generator=random).to(model.device)


def _read(model: Any, ids: Tensor, cache: Any, piece: int) -> Tensor:
    """Put prompts [B, N] into a cache, `piece` tokens of each at once; logits [B, 1, V] of the next token."""
    last = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    logits = ids
    for part in ids.split(piece, dim=1):
        logits = model(part, past_key_values=cache, use_cache=True, **last).logits
    return logits[:, -1:]


def _stepping(model: Any, token: Tensor, cache: Any) -> Callable[[], None]:
    """What decodes one more token of each text; the token [B, 1] is changed in place."""

    def step() -> None:
        token.copy_(model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1))

    return step


def _repeat(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()
