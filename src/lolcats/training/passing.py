"""State passing: long texts read in parts, the state of all layers carried on from part to part without its gradient.

Trained on a few thousand tokens, a state of constant size is in places that it has never been in when a text goes on;
some hundred steps like these at the end mend that (arXiv 2507.02782). Memory is that of one part, but for the keys and
values of the teacher and of layers that keep softmax attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lolcats.config import FinetuneConfig, OptimConfig
from lolcats.data import PackedDataset, long_texts
from lolcats.errors import LolcatsError
from lolcats.modeling import linearized_layers
from lolcats.modeling.cache_contents import detach_cache
from lolcats.models.context import check_context, context_limit
from lolcats.training.batches import Batch, step_rows

PartLoss = Callable[[dict[str, Any], dict[str, Any], Tensor, Tensor | None], tuple[Tensor, dict[str, Tensor]]]
"""Of inputs of the student, those of the teacher, labels and weights [B, N]: the loss, and its parts by name."""


class Passing:
    """The steps of a stage that read long texts.

    Args:
        share: of the steps, at the end.
        chunks: sequences that make a text.
        data: the training sequences.
        steps: of the stage.
        seed: of the order of the texts.

    Raises:
        LolcatsError: no document of the data is so long.
    """

    def __init__(self, share: float, chunks: int, data: PackedDataset, steps: int, seed: int) -> None:
        self.chunks, self.data, self.seed = chunks, data, seed
        self.length = int(data.ids.shape[1])
        self.start = steps - round(share * steps)
        """The first step that reads long texts."""
        self.texts = long_texts(data, chunks)
        if not len(self.texts):
            raise LolcatsError(
                f"finetune.passing reads texts of {chunks} x {self.length:,} tokens, but no training document fills so "
                "many sequences of data.sequence_length in a row; add sources of long documents (books), or lower "
                "finetune.passing.chunks or data.sequence_length"
            )

    def rows(self, step: int, batch_size: int, process: int, processes: int) -> PackedDataset:
        """The texts [n, chunks * L] of a step that a process reads, as many tokens in all as `batch_size` sequences."""
        chosen = step_rows(len(self.texts), step - self.start, batch_size // self.chunks, self.seed)
        first = self.texts[chosen[process::processes]]
        parts = self.data[(first[:, None] + np.arange(self.chunks)).reshape(-1)]
        long = (array.reshape(len(first), -1) for array in (parts.ids, parts.loss_mask, parts.document))
        return PackedDataset(*long)


def passing_of(config: OptimConfig, data: PackedDataset, steps: int, seed: int, processes: int) -> Passing | None:
    """The steps with long texts that a stage asks for, None where it asks for none.

    Raises:
        LolcatsError: no document is so long, or a step has fewer texts than there are processes.
    """
    if not isinstance(config, FinetuneConfig) or not config.passing.share:
        return None
    texts = config.batch_size // config.passing.chunks
    if texts < processes:
        raise LolcatsError(
            f"finetune.batch_size {config.batch_size} makes {texts} long texts of finetune.passing.chunks "
            f"{config.passing.chunks}, but {processes} processes share each step: raise it to "
            f"{processes * config.passing.chunks} or more, or start fewer processes"
        )
    return Passing(config.passing.share, config.passing.chunks, data, steps, seed)


def check_passing_context(config: FinetuneConfig, model: PreTrainedModel, length: int) -> None:
    """Refuse texts that the model, or the teacher that it follows, was not made for.

    Raises:
        LolcatsError: they are longer than the model's context, and positions end there or a teacher is followed.
    """
    if not config.passing.share:
        return
    tokens, limit = config.passing.chunks * length, context_limit(model)
    check_context(model, tokens, "a text of finetune.passing")
    if config.kl_factor and limit is not None and tokens > limit:
        raise LolcatsError(
            f"finetune.passing reads texts of {tokens:,} tokens, longer than the context of {limit:,} that the teacher "
            "was made for (max_position_embeddings); lower finetune.passing.chunks or data.sequence_length, or set "
            "finetune.kl_factor=0 and finetune.cross_entropy_factor=1 to learn from the text alone"
        )


def backward_in_parts(
    batch: Batch,
    labels: Tensor,
    weights: Tensor | None,
    share: float | Tensor,
    model: PreTrainedModel,
    loss_of: PartLoss,
    together: bool = False,
) -> dict[str, Tensor]:
    """Back-propagate `share` times the mean loss over the tokens of long texts, part by part.

    Args:
        batch: texts [B, chunks * N] with `chunk` = N.
        labels: [B, chunks * N], -100 where nothing counts; those at the end of a part are the first tokens of the next.
        weights: of the tokens [B, chunks * N], None where all that count weigh the same.
        share: the weight of the whole.
        model: the student, whose config says what caches are made of.
        loss_of: of one part.
        together: all processes go backward through each part, for each has a share of the weights.

    Returns:
        The mean over all tokens of the loss and its parts.
    """
    assert batch.chunk is not None
    student, teacher = (DynamicCache(config=model.config) for _ in range(2))
    parts = list(zip(batch.input_ids.split(batch.chunk, 1), labels.split(batch.chunk, 1), strict=True))
    heavy = [None] * len(parts) if weights is None else list(weights.split(batch.chunk, 1))
    counts = [_counted(own, its) for (_, own), its in zip(parts, heavy, strict=True)]
    totals: dict[str, Tensor] = {}
    with _differentiable_states(model):
        for (ids, own), own_weights, count in zip(parts, heavy, counts, strict=True):
            mine, its = (
                {"input_ids": ids, "past_key_values": cache, "use_cache": True} for cache in (student, teacher)
            )
            loss, named = loss_of(mine, its, own, own_weights)
            weight = count / (sum(counts) or 1)
            if count or together:
                (loss * (share * weight)).backward()
            for name, value in {"loss": loss.detach(), **named}.items():
                totals[name] = totals.get(name, 0) + value * weight
            detach_cache(student)
    return totals


def _counted(labels: Tensor, weights: Tensor | None) -> float:
    """Tokens that count, by their weights."""
    counted = labels != -100
    return float(counted.sum() if weights is None else weights[counted].sum())


@contextmanager
def _differentiable_states(model: nn.Module) -> Iterator[None]:
    """Inside, layers that were asked for Triton's kernels take what can run: some give no gradient after a state."""
    mixers = [layer.mixer for layer in linearized_layers(model) if layer.mixer.impl == "triton"]
    try:
        for mixer in mixers:
            mixer.impl = "auto"
        yield
    finally:
        for mixer in mixers:
            mixer.impl = "triton"
