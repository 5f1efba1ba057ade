"""Which models are measured at which batches and contexts, one model in memory at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lolcats.config import load_config
from lolcats.errors import LolcatsError
from lolcats.evaluation.speed.clock import release
from lolcats.evaluation.speed.limit import StepBytes, step_bytes
from lolcats.evaluation.speed.measure import WARM, Times, measure_times
from lolcats.evaluation.speed.rows import ENGINE, Row
from lolcats.modeling import convert, linearized_layers
from lolcats.modeling.decode_graphs import set_decode_graphs
from lolcats.modeling.recorders import record_cuda
from lolcats.models.context import check_context, context_limit
from lolcats.models.device import choose_dtype, memory_size
from lolcats.models.folder import check_place, expand_model
from lolcats.models.shapes import SHAPES, random_model
from lolcats.models.teacher import load_teacher

CONTEXTS = (1024, 4096, 16_384)
"""What is measured where no contexts are named, as far as the model's own goes."""
TEXT_TOKENS = 512
"""Random tokens by which untrained layers start, where their recipe wants text."""


@dataclass(frozen=True)
class SpeedSettings:
    """What is measured.

    Args:
        batches: numbers of texts.
        contexts: tokens of their prompts; None is `CONTEXTS` as far as the model's own context goes.
        tokens: decoded for one measurement.
        repeat: measurements, of which the median counts.
        beyond_context: allow contexts beyond the model's own.
        graphs: decode by CUDA graphs on a GPU.

    Raises:
        LolcatsError: a number below 1, or none.
    """

    batches: Sequence[int] = (1, 8, 64)
    contexts: Sequence[int] | None = None
    tokens: int = 32
    repeat: int = 3
    beyond_context: bool = False
    graphs: bool = True

    def __post_init__(self) -> None:
        contexts = CONTEXTS if self.contexts is None else self.contexts
        for name, numbers in (("batch", self.batches), ("context", contexts), ("tokens", [self.tokens]),
                              ("repeat", [self.repeat])):  # fmt: skip
            if not numbers or min(numbers) < 1:
                raise LolcatsError(f"{name}: expected numbers from 1 on; got {', '.join(map(str, numbers)) or 'none'}")

    def contexts_of(self, model: PreTrainedModel, rest: Callable[[int], int] | None = None) -> list[int]:
        """Tokens of prompts for a model.

        Args:
            model: with or without weights.
            rest: how many tokens follow a prompt of so many; None is what forward passes need.

        Raises:
            LolcatsError: it was not made for so many.
        """
        rest = rest or (lambda context: self.tokens + 2 * WARM + 1)
        if self.contexts is not None:
            most = max(context + rest(context) for context in self.contexts)
            check_context(model, most, "prompt and continuation", beyond=self.beyond_context)
            return list(self.contexts)
        if (limit := context_limit(model)) is None:
            return list(CONTEXTS)
        new = rest(limit)
        if limit <= new:
            raise LolcatsError(
                f"the model's context of {limit:,} tokens has no room for {new:,} new ones; decode fewer"
            )
        return [tokens for tokens in CONTEXTS if tokens + rest(tokens) <= limit] or [limit - new]


@dataclass(frozen=True)
class Subjects:
    """Where the models come from.

    Args:
        source: a model, linearized or not; a name of `lolcats.models.shapes.SHAPES` too.
        teacher: of a linearized model; None leaves it out.
        recipe: what a model that is not linearized is converted by, untrained; it is its own teacher then.
        random_weights: read configurations alone; always so for a name of `SHAPES`.
        device: where.
        dtype: "auto", "float32" or "bfloat16"; "auto" is a linearized model's own.
    """

    source: str
    teacher: str | None
    recipe: str | None
    random_weights: bool
    device: torch.device
    dtype: str

    def each(self) -> Iterator[tuple[str, PreTrainedModel]]:
        """ "student" and "teacher" with their models, of which only one is held here.

        Raises:
            LolcatsError: a model cannot be loaded, or linearized, or is linearized where it must not be.
        """
        if self.teacher is not None and self.recipe is None:  # found before the student has taken its time
            check_place(expand_model(self.teacher))
        model = self._load(self.source, None)
        if self.recipe is not None:
            yield from self._converted(model, self.recipe)
            return
        dtype, linearized = model.dtype, bool(linearized_layers(model))
        yield ("student" if linearized else "teacher"), model
        del model
        release(self.device)
        if linearized and self.teacher is not None:
            other = self._load(self.teacher, dtype)
            self.check_teacher(other)
            yield "teacher", _fastest(other)

    def check_teacher(self, model: PreTrainedModel) -> None:
        """Raise LolcatsError where the teacher's model is linearized."""
        if linearized_layers(model):
            raise LolcatsError(f"the teacher {self.teacher} is linearized itself; name the model from before, or none")

    def _converted(self, model: PreTrainedModel, recipe: str) -> Iterator[tuple[str, PreTrainedModel]]:
        if linearized_layers(model):
            raise LolcatsError(f"{self.source} is linearized already; give no recipe, or a model that is not")
        settings = load_config(recipe).linearization
        if self.teacher is not None:
            attention = model.config._attn_implementation
            yield "teacher", _fastest(model)
            if model.config._attn_implementation != attention:
                model.set_attn_implementation(str(attention))
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        ids = torch.randint(0, vocabulary, (1, TEXT_TOKENS), generator=torch.Generator().manual_seed(0))
        yield "student", convert(model, settings, input_ids=ids.to(self.device), seed=0)

    def _load(self, source: str, dtype: torch.dtype | None) -> PreTrainedModel:
        """A model of a dtype; None chooses it."""
        chosen = dtype or choose_dtype(self.dtype, self.device)
        if self.random_weights or source in SHAPES:
            return random_model(source, chosen, self.device)
        own = dtype is None and self.dtype == "auto"
        model, _ = load_teacher(source, dtype=None if own else chosen, device=self.device)
        return model if linearized_layers(model) else model.to(chosen)  # type: ignore[arg-type]


def _fastest(model: PreTrainedModel) -> PreTrainedModel:
    """A teacher with FlashAttention where it is installed and runs; else as it was loaded, with SDPA."""
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if has_flash and model.device.type == "cuda" and model.dtype == torch.bfloat16:
        with suppress(ValueError, ImportError):  # of a family that has none
            model.set_attn_implementation("flash_attention_2")
    return model


def measure_speed(
    subjects: Iterator[tuple[str, PreTrainedModel]],
    settings: SpeedSettings,
    bandwidth: float,
    report: Callable[[str, int, int | None], None] = lambda name, done, count: None,
) -> Iterator[Row]:
    """Measure models, a row at a time.

    Args:
        subjects: see `Subjects.each`.
        settings: at which batches and contexts.
        bandwidth: bytes a second that the device moves, see `copy_bandwidth`.
        report: called with what is measured, rows of it that are done, and all of them.

    Raises:
        LolcatsError: contexts beyond a model's.
    """
    for variant, model in subjects:
        if linearized_layers(model):
            set_decode_graphs(model, settings.graphs)
        cost = step_bytes(model)
        cases = [(batch, context) for context in settings.contexts_of(model) for batch in settings.batches]
        for done, (batch, context) in enumerate(cases):
            report(f"{variant}, batch {batch:,}, context {context:,}", done, len(cases))
            yield _row(model, cost, (variant, batch, context), settings, bandwidth)
        del model


def _row(
    model: PreTrainedModel, cost: StepBytes, case: tuple[str, int, int], settings: SpeedSettings, bandwidth: float
) -> Row:
    variant, batch, context = case
    begin = context + WARM
    end, moved = begin + settings.tokens, cost.moved(batch, begin + settings.tokens // 2)
    mixer = (getattr(model.config, "linearization", None) or {}).get("mixer")
    return Row(
        ENGINE, variant, mixer or str(model.config._attn_implementation),
        str(model.dtype).removeprefix("torch."), batch, context, settings.tokens,
        _times(model, batch, context, settings, batch * cost.text(end)),
        limit=moved / bandwidth, step_bytes=moved, weight_bytes=cost.weights, text_bytes=cost.text(end),
    )  # fmt: skip


def _times(model: PreTrainedModel, batch: int, context: int, settings: SpeedSettings, needed: int) -> Times:
    """Measured, unless the texts alone take more than there is: systems end a process that fills a CPU's memory."""
    if model.device.type == "cpu" and needed > memory_size():
        return Times()
    record = record_cuda if settings.graphs and model.device.type == "cuda" else None
    return measure_times(model, batch, context, settings.tokens, settings.repeat, record)
