"""The text that a run is measured on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lolcats.config import RunConfig
from lolcats.data import PackedDataset
from lolcats.data.packing import read_documents
from lolcats.errors import DataError
from lolcats.evaluation.perplexity import as_segments


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
