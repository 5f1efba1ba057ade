"""What vLLM is told of each model: its folder, where its weights come from, and what to measure.

No weights are read here, unless a recipe has to convert a model or a GGUF file has to become a folder. Of a recipe's
models vLLM is given the configurations alone: their layers are untrained, and speed depends on no weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.evaluation.speed import SpeedSettings, StepBytes, Subjects, step_bytes
from lolcats.evaluation.speed.clock import release
from lolcats.modeling import linearized_layers
from lolcats.models.context import context_limit
from lolcats.models.device import choose_dtype
from lolcats.models.empty import empty_model
from lolcats.models.folder import expand_model
from lolcats.models.shapes import SHAPES, config_of
from lolcats.models.teacher import explained, load_teacher
from lolcats.serving.vllm_bench.engine import Case, Order

READ_AT_ONCE = 8192
"""Tokens of all texts that a step of the engine takes, unless its options say otherwise."""
OURS = ("model", "dtype", "load_format", "max_model_len", "max_num_seqs", "enforce_eager", "enable_prefix_caching")
"""Arguments of `vllm.LLM` that follow from what is measured."""


@dataclass(frozen=True)
class Job:
    """One model in one engine."""

    variant: str
    """"student" or "teacher"."""
    mixer: str | None
    """Of its linearized layers."""
    dtype: str
    cost: StepBytes
    order: Order


def find_jobs(subjects: Subjects, settings: SpeedSettings, folder: Path, options: Mapping[str, Any]) -> list[Job]:
    """One for each model; what is wrong with any of them is found before the first one takes its time.

    Args:
        subjects: the models.
        settings: at which batches and contexts.
        folder: an empty one, where configurations are written; it must stay while the jobs run.
        options: more arguments of `vllm.LLM`.

    Raises:
        LolcatsError: a model cannot be read or converted, contexts are beyond it, or options contradict the rest.
    """
    if subjects.device.type == "mps" or subjects.device.index:
        raise LolcatsError(
            f"vLLM runs on the CPU or the first GPU that it sees, not on {subjects.device}; choose by "
            "CUDA_VISIBLE_DEVICES, and name no device"
        )
    if taken := sorted(set(OURS) & set(options)):
        raise LolcatsError(f"{taken[0]} of vLLM follows from what is measured; leave it out of its options")
    models = _configured(subjects, folder) if subjects.recipe is not None else _given(subjects, folder)
    found = [_job(variant, arguments, model, settings, options) for variant, arguments, model in models]
    release(subjects.device)
    return found


def _configured(subjects: Subjects, folder: Path) -> Iterator[tuple[str, dict[str, Any], PreTrainedModel]]:
    """The models of a recipe: (variant, where vLLM finds it, the model)."""
    for variant, model in subjects.each():
        yield variant, _config_alone(model, folder / variant), model


def _given(subjects: Subjects, folder: Path) -> Iterator[tuple[str, dict[str, Any], PreTrainedModel]]:
    """A model and its teacher, both without weights."""
    arguments, model = _open(subjects, subjects.source, None, folder / "model")
    linearized = bool(linearized_layers(model))
    yield ("student" if linearized else "teacher"), arguments, model
    if linearized and subjects.teacher is not None:
        arguments, teacher = _open(subjects, subjects.teacher, model.dtype, folder / "teacher")
        subjects.check_teacher(teacher)
        yield "teacher", arguments, teacher


def _open(
    subjects: Subjects, source: str, dtype: torch.dtype | None, folder: Path
) -> tuple[dict[str, Any], PreTrainedModel]:
    """Where vLLM finds a model, and the model without weights, in the format that `Subjects` would load it in."""
    chosen, source = dtype or choose_dtype(subjects.dtype, subjects.device), expand_model(source)
    if source == "demo" or source.endswith(".gguf"):
        model, _ = load_teacher(source, dtype=chosen)
        model.save_pretrained(folder)
        return {"model": str(folder)}, model
    config, random = config_of(source), subjects.random_weights or source in SHAPES
    own = getattr(config, "linearization", None) and dtype is None and subjects.dtype == "auto" and not random
    with explained(source):
        model = empty_model(config, None if own else chosen)
    return (_config_alone(model, folder) if random else {"model": source}), model


def _config_alone(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """A folder of which vLLM makes the model with weights of its own. They are small random numbers, those of mixers
    too; what mixers keep that is no such number, the order of channels, stays what it is when a mixer is made.
    """
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return {"model": str(folder), "load_format": "dummy"}


def _job(
    variant: str, arguments: dict[str, Any], model: PreTrainedModel, settings: SpeedSettings, options: Mapping[str, Any]
) -> Job:
    at_once = max(int(options.get("max_num_batched_tokens", READ_AT_ONCE)), 2 * max(settings.batches))

    def lead(context: int) -> int:
        return lead_tokens(max(settings.batches), context, at_once)

    contexts = settings.contexts_of(model, lambda context: lead(context) + settings.tokens)
    cases = [
        Case(batch, context, lead_tokens(batch, context, at_once)) for context in contexts for batch in settings.batches
    ]
    longest = max(context + lead(context) for context in contexts) + settings.tokens
    linearized, limit = bool(linearized_layers(model)), context_limit(model)
    dtype = str(model.dtype).removeprefix("torch.")
    arguments = dict(options) | arguments | {
        "dtype": dtype, "max_model_len": longest, "max_num_seqs": max(settings.batches),
        "max_num_batched_tokens": at_once, "enforce_eager": not settings.graphs, "enable_prefix_caching": False,
        "skip_tokenizer_init": True, "generation_config": "vllm", "disable_log_stats": True,
    }  # fmt: skip
    if not linearized and limit is not None and longest > limit:
        # The plugin makes the positions of linearized models longer; of others they end with the context.
        arguments["hf_overrides"] = {"max_position_embeddings": longest}
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    order = Order(arguments, tuple(cases), settings.tokens, settings.repeat, vocabulary)
    mixer = (getattr(model.config, "linearization", None) or {}).get("mixer")
    return Job(variant, mixer, dtype, step_bytes(model), order)


def lead_tokens(batch: int, context: int, at_once: int) -> int:
    """Tokens that each text decodes before those that are timed.

    The engine reads `at_once` tokens in a step, those of texts that decode already among them. So the first texts write
    while the last are read; after so many tokens all of them are there, and none has ended.
    """
    return math.ceil(batch * context / (at_once - batch)) + 2
