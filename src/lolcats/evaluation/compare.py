"""A saved student against its teacher: both loaded, all measured on the same segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.config import LinearizationConfig, RunConfig
from lolcats.data.build import build_datasets, local_names
from lolcats.data.packing import read_documents
from lolcats.data.sources import check_source
from lolcats.errors import DataError, LolcatsError
from lolcats.evaluation.memory import TextMemory, text_memory
from lolcats.evaluation.perplexity import (
    Measurement,
    Variant,
    as_segments,
    evaluation_segments,
    measure,
)
from lolcats.evaluation.trained_window import has_window, read_window
from lolcats.evaluation.variants import student_variants, teacher_variants, window_variants
from lolcats.modeling import convert, linearized_layers
from lolcats.modeling.attention import measured_buffers
from lolcats.models.context import check_context
from lolcats.models.device import choose_device, choose_dtype
from lolcats.models.device_map import DeviceMap, first_device
from lolcats.models.teacher import load_teacher
from lolcats.models.vocabulary import vocabulary_size
from lolcats.placing import main_device
from lolcats.variants import CONTROLS, TRAINED_WINDOW


def compare(
    model: str | Path,
    *,
    teacher: str | Path | None = None,
    sources: Sequence[str] = ("python-docs",),
    local: Mapping[str, str] | None = None,
    held_out: RunConfig | None = None,
    length: int = 1024,
    last: int | None = None,
    max_segments: int | None = None,
    batch_size: int = 4,
    controls: Sequence[str] = CONTROLS,
    device: str = "auto",
    dtype: str = "auto",
    device_map: DeviceMap | None = None,
    edges: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Measurement]:
    """Score a linearized model, its controls and its teacher; or any other model by itself.

    Args:
        model: what `load_teacher` takes; a model that is not linearized scores as "teacher".
        teacher: the weights from before the linearization; None leaves out all that needs them, the trained window
            among it, which is also left out where the model's folder has none.
        sources, local: see `lolcats.data.iter_records`; or token files.
        held_out: in place of sources, the text that this run held out from training.
        length, last, max_segments: tokens per segment, how many of them count (from the end), segments to read.
        controls, batch_size, edges, progress: see `lolcats.variants` and `measure`.
        device, dtype: as in `RunConfig`; the "auto" dtype of a linearized model is its own.
        device_map: in place of `device`, for models that do not fit on one; see `load_teacher`. The "auto" dtype of any
            model is its own then.

    Raises:
        LolcatsError: a model or a source that cannot be used, a teacher of another model, or segments longer than
            a table of positions.
    """
    if last is not None and last >= length:
        raise DataError(f"last={last} must be less than the length of a segment, {length}")
    if held_out is None:
        for source in sources:
            check_source(source, local or {})
    loaded = load_variants(model, teacher=teacher, controls=controls, device=device, dtype=dtype, device_map=device_map)
    first = next(iter(loaded.variants.values())).model
    check_context(first, length, "a segment")
    if held_out is not None:
        segments = held_out_segments(held_out, loaded.tokenizer, local, length, last, max_segments)
    else:
        segments = read_segments(sources, local, loaded.tokenizer, vocabulary_size(first), length, max_segments)
    return measure(
        loaded.variants,
        segments,
        teacher=loaded.teacher,
        last=last,
        batch_size=batch_size,
        edges=edges,
        progress=progress,
    )


@dataclass
class Loaded:
    """A model in all its modes, ready to be measured."""

    variants: dict[str, Variant]
    """By name, see `lolcats.variants`; a model that is not linearized is "teacher" alone."""
    teacher: Variant | None
    """What distances are measured from; None for a model by itself, or without its teacher."""
    tokenizer: PreTrainedTokenizerBase
    memory: TextMemory | None = None
    """Of a linearized model."""


def load_variants(
    model: str | Path,
    *,
    teacher: str | Path | None = None,
    controls: Sequence[str] = CONTROLS,
    device: str = "auto",
    dtype: str = "auto",
    device_map: DeviceMap | None = None,
) -> Loaded:
    """A linearized model, its controls and its teacher; arguments and errors as in `compare`.

    Weights that are kept on disk or in main memory cannot be exchanged, so there the trained window is left out.
    """
    place = choose_device(device) if device_map is None else first_device(device_map)
    wanted = None if dtype == "auto" else choose_dtype(dtype, place)
    student, tokenizer = load_teacher(model, dtype=wanted, device=place, device_map=device_map)
    if not linearized_layers(student):
        if device_map is None:
            student.to(choose_dtype(dtype, place))  # type: ignore[arg-type]
        return Loaded({"teacher": Variant(student)}, None, tokenizer)
    before: dict[str, Variant] = {}
    if teacher is not None:
        plain = _load_before(teacher, student, device_map)
        before = teacher_variants(plain, controls=controls)
        if TRAINED_WINDOW in controls and has_window(model) and not any(p.is_meta for p in plain.parameters()):
            before |= window_variants(plain, controls, read_window(plain, model))
    return Loaded(before | student_variants(student, controls), before.get("teacher"), tokenizer, text_memory(student))


def _load_before(teacher: str | Path, student: PreTrainedModel, device_map: DeviceMap | None) -> PreTrainedModel:
    """The teacher with the student's layers around its own weights: softmax, and window alone, are modes of it."""
    try:
        model, _ = load_teacher(teacher, dtype=student.dtype, device=main_device(student), device_map=device_map)
        settings = LinearizationConfig(**student.config.linearization)  # type: ignore[attr-defined]
        convert(model, settings.without_text(), seed=0, spread=device_map is not None)
        measured = measured_buffers(student)
        for name, held in measured_buffers(model).items():
            held.copy_(measured[name])
    except LolcatsError as error:
        raise LolcatsError(f"the teacher cannot be used: {error}; name another one, or none") from error
    if model.config.vocab_size != student.config.vocab_size:
        raise LolcatsError(
            f"{teacher} has {model.config.vocab_size} tokens and the linearized model {student.config.vocab_size}, "
            "so it is not its teacher; name another one, or none"
        )
    return model


def read_segments(
    sources: Sequence[str],
    local: Mapping[str, str] | None,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int | None,
    length: int,
    count: int | None,
) -> Tensor:
    """Segments [S, length] int64 of text, at most `count`; arguments as in `compare`.

    Raises:
        DataError: a source cannot be read, or has not the tokens of one segment.
    """
    limit = None if count is None else count * length
    documents = read_documents(sources, "auto", tokenizer, limit, local=local, vocabulary=vocabulary)
    ids = np.concatenate([document.ids for document in documents]).astype(np.int64)
    try:
        return as_segments(torch.from_numpy(ids), length)
    except ValueError as error:
        raise DataError(f"{', '.join(sources)}: {error}; choose a shorter length") from error


def held_out_segments(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    local: Mapping[str, str] | None,
    length: int,
    last: int | None,
    count: int | None,
) -> Tensor:
    """Segments [S, length] int64 of the text that a run validates on."""
    wanted = {"sources": [], "segment_length": length, "last": last, "max_segments": count}
    evaluation = config.evaluation.model_copy(update=wanted)
    names = local_names(config.data.source_names)
    copies = {name: copy for name, copy in (local or {}).items() if name in names}
    try:
        _, validation = build_datasets(config.data.model_copy(update={"local": copies}), tokenizer, config.seed)
        return evaluation_segments(config.model_copy(update={"evaluation": evaluation}), tokenizer, validation)
    except DataError as error:
        raise DataError(f"the text that the recipe held out: {error}; or name other text", hint="sources") from error
