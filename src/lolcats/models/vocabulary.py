"""Whether token ids have a row in a model's embedding. Without one, a GPU asserts, which ends the whole process."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.errors import DataError

PIECE = 2**24
"""Ids looked at together: data sets may be mapped from the disk."""


def vocabulary_size(model: PreTrainedModel) -> int | None:
    """Rows of a model's embedding; None where it has none that can be counted."""
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        embedding = None
    rows = getattr(embedding, "num_embeddings", None) or getattr(model.config.get_text_config(), "vocab_size", None)
    return int(rows) if isinstance(rows, int) else None


def check_token_ids(ids: Tensor | NDArray[np.integer], model: PreTrainedModel, what: str) -> None:
    """Refuse token ids that the model does not know.

    Args:
        ids: token ids of any shape.
        model: the model that is to read them.
        what: their name in the message, such as "the prompt".

    Raises:
        DataError: an id is negative or beyond the embedding.
    """
    rows = vocabulary_size(model)
    flat = ids.reshape(-1)
    if rows is None or flat.shape[0] == 0:
        return
    pieces = [flat[begin : begin + PIECE] for begin in range(0, flat.shape[0], PIECE)]
    smallest, largest = min(int(piece.min()) for piece in pieces), max(int(piece.max()) for piece in pieces)
    if smallest < 0 or largest >= rows:
        raise DataError(
            f"{what} holds token {largest if largest >= rows else smallest}, but the model knows 0 to {rows - 1:,} "
            "(rows of its embedding): the tokens are of another model's tokenizer, or some were added to it; use the "
            "model's own, or enlarge the model first: model.resize_token_embeddings(len(tokenizer))"
        )
