"""Perplexity and distance from the teacher, overall and by position: of which variants, and on what text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.config import RunConfig
from lolcats.data import PackedDataset
from lolcats.data.packing import read_documents
from lolcats.errors import DataError
from lolcats.modeling.head import OutputHead
from lolcats.models.context import context_limit
from lolcats.models.vocabulary import check_token_ids
from lolcats.placing import main_device
from lolcats.training.losses import HEAD_CHUNK


@dataclass
class Variant:
    """A model in one of its modes, for instance "window_only"."""

    model: PreTrainedModel
    mode: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered around each forward pass."""
    own_weights: bool = False
    """Whether the mode brings weights of its own."""


@dataclass
class Measurement:
    """What one variant scores."""

    perplexity: float
    """exp of the mean loss of the counted tokens."""
    loss: float
    """Mean negative log-likelihood of the counted tokens, nats."""
    kl: float | None
    """Mean KL(teacher || variant) of the counted tokens, nats; None without a teacher."""
    tokens: int
    """Counted tokens."""
    by_position: dict[str, float] = field(default_factory=dict)
    """Perplexity of the tokens whose index in their segment lies in "start-end"."""
    context: int | None = None
    """Tokens that the model was made for: ranges from there on are beyond it. None where its config does not say."""


@dataclass
class _Sums:
    loss: Tensor  # [L - 1] float64, summed over segments
    kl: Tensor  # [L - 1] float64


@torch.no_grad()
def measure(
    variants: Mapping[str, Variant],
    segments: Tensor,
    *,
    teacher: Variant | None = None,
    last: int | None = None,
    batch_size: int = 4,
    edges: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Measurement]:
    """Score variants on the same segments.

    Args:
        variants: what to score, by name.
        segments: [S, L] token ids; the first token of a segment is context only.
        teacher: what `kl` compares with.
        last: count only the last tokens of each segment; None counts all but the first.
        batch_size: segments at once.
        edges: places where a range of `by_position` shall end, besides the usual ones and the end of the context.
        progress: called with (segments done, all segments).

    Raises:
        ValueError: segments too short for `last`.
    """
    count, length = segments.shape
    if length < 2 or (last is not None and not 1 <= last < length):
        raise ValueError(f"expected segments longer than last={last} (and than 1 token); got {length} tokens")
    for variant in variants.values():
        check_token_ids(segments, variant.model, "the text to measure on")
    zeros = torch.zeros(length - 1, dtype=torch.float64)
    sums = {name: _Sums(zeros.clone(), zeros.clone()) for name in variants}
    models = [variant.model for variant in [*variants.values(), *([] if teacher is None else [teacher])]]
    heads = {model: OutputHead(model) for model in dict.fromkeys(models)}
    for begin in range(0, count, batch_size):
        ids = segments[begin : begin + batch_size].long()
        reference = None if teacher is None else _States.of(teacher, heads, ids)
        for name, variant in variants.items():
            states = reference if reference is not None and variant is teacher else _States.of(variant, heads, ids)
            loss, kl = _token_scores(states, ids, reference)
            sums[name].loss += loss
            sums[name].kl += kl
        if progress is not None:
            progress(min(begin + batch_size, count), count)
    result = {}
    for name, variant in variants.items():
        context = context_limit(variant.model)
        buckets = position_buckets(length, [*edges, *([] if context is None else [context])])
        result[name] = _summary(sums[name], count, last, teacher is not None, buckets)
        result[name].context = context
    return result


class _States(NamedTuple):
    """Hidden states [B, L, d_model] of a variant, and what its logits are made from them with."""

    hidden: Tensor
    head: OutputHead
    mode: Callable[[], AbstractContextManager[object]]

    @classmethod
    def of(cls, variant: Variant, heads: Mapping[PreTrainedModel, OutputHead], ids: Tensor) -> _States:
        """One forward pass over ids [B, L]."""
        head = heads[variant.model]
        with variant.mode():
            return cls(head.hidden(input_ids=ids.to(main_device(variant.model)), use_cache=False), head, variant.mode)

    def log_probabilities(self, part: slice) -> Tensor:
        """[B, tokens of `part`, vocabulary]."""
        with self.mode():  # a head of several layers may carry adapters
            return self.head(self.hidden[:, part]).log_softmax(-1)


def _token_scores(student: _States, ids: Tensor, teacher: _States | None) -> tuple[Tensor, Tensor]:
    """Loss and KL of each position, summed over the batch: [L - 1] float64 on the CPU."""
    targets = ids[:, 1:].to(student.hidden.device)
    loss = torch.zeros(targets.shape, device=student.hidden.device)
    kl = torch.zeros_like(loss)
    step = max(1, HEAD_CHUNK // ids.shape[0])
    for begin in range(0, targets.shape[1], step):
        part = slice(begin, min(begin + step, targets.shape[1]))
        log_p = student.log_probabilities(part)
        loss[:, part] = nnf.nll_loss(log_p.flatten(0, 1), targets[:, part].flatten(), reduction="none").view_as(
            targets[:, part]
        )
        if teacher is not None:
            log_t = log_p if teacher is student else teacher.log_probabilities(part).to(log_p.device)
            kl[:, part] = (log_t.exp() * (log_t - log_p)).sum(-1)
    return loss.sum(0).double().cpu(), kl.sum(0).double().cpu()


def _summary(
    sums: _Sums, segments: int, last: int | None, has_teacher: bool, ranges: list[tuple[int, int]]
) -> Measurement:
    length = sums.loss.shape[0]
    counted = slice(length - last if last is not None else 0, length)
    tokens = segments * (counted.stop - counted.start)
    loss = float(sums.loss[counted].sum()) / tokens
    kl = float(sums.kl[counted].sum()) / tokens if has_teacher else None
    buckets = {}
    for start, end in ranges:
        part = sums.loss[start - 1 : end - 1]
        buckets[f"{start}-{end}"] = _exp(float(part.sum()) / (segments * len(part)))
    return Measurement(_exp(loss), loss, kl, tokens, buckets)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def position_buckets(length: int, edges: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Ranges [start, end) of token index, doubling from 64 and cut at `edges`: predicted tokens 1 .. length - 1."""
    inner = {edge for edge in edges if 1 < edge < length}
    edge = 64
    while edge < length:
        inner.add(edge)
        edge *= 2
    starts = [1, *sorted(inner)]
    return list(zip(starts, [*starts[1:], length], strict=True))


def as_segments(ids: list[int] | Tensor, length: int) -> Tensor:
    """Cut a token stream into [S, length], the rest dropped.

    Raises:
        ValueError: fewer than `length` tokens.
    """
    stream = cast(Tensor, torch.as_tensor(ids))
    count = len(stream) // length
    if count == 0:
        raise ValueError(f"expected at least {length} tokens of evaluation text; got {len(stream)}")
    return stream[: count * length].view(count, length)


def evaluation_segments(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    validation: PackedDataset | None,
    vocabulary: int | None = None,
) -> Tensor:
    """Segments [S, L] int64: of `evaluation.sources`, or the held-out sequences where that is empty.

    Args:
        config: of the run.
        tokenizer: of its teacher.
        validation: the held-out sequences; not needed with sources.
        vocabulary: tokens of the model, see `read_documents`.

    Raises:
        DataError: a source is missing, or too short for one segment.
    """
    e = config.evaluation
    if not e.sources:
        assert validation is not None
        real = torch.from_numpy(validation.ids[validation.document >= 0]).long()  # padding is no text
        try:
            segments = as_segments(real, e.segment_length or validation.ids.shape[1])
        except ValueError as error:
            raise DataError(f"held-out text: {error}; lower evaluation.segment_length") from error
    else:
        length = e.segment_length or config.data.sequence_length
        documents = read_documents(e.sources, "auto", tokenizer, local=config.data.local, vocabulary=vocabulary)
        ids = np.concatenate([document.ids for document in documents])
        try:
            segments = as_segments(torch.from_numpy(ids.astype(np.int64)), length)
        except ValueError as error:
            raise DataError(f"{', '.join(e.sources)}: {error}; lower evaluation.segment_length") from error
    if e.last is not None and e.last >= segments.shape[1]:
        raise DataError(f"evaluation.last={e.last} must be less than the segment length {segments.shape[1]}")
    return segments if e.max_segments is None else segments[: e.max_segments]
