"""Going on after texts that were read: what `generate` of transformers must be told, and a copy of the cache.

It takes new tokens alone, if the attention mask is that of all tokens so far and of these.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lolcats.errors import LolcatsError
from lolcats.modeling.cache import LinearizedLayer


def continue_from(cache: Cache, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
    """What `generate` and a forward pass need to go on after the texts of a cache, which itself stays as it is.

    Args:
        cache: of texts that were read; one of a single text is repeated for several rows.
        input_ids: [B, N], the new tokens alone.
        attention_mask: of the new tokens [B, N], 0 at padding; or of all tokens so far and these.

    Returns:
        input_ids, the attention mask of all tokens, and a copy of the cache (`past_key_values`).

    Raises:
        LolcatsError: other numbers of rows or columns; or the mask of earlier tokens is needed and not given.
    """
    own = copy.deepcopy(cache)
    seen, batch, new = int(cache.get_seq_length()), *input_ids.shape
    states = [layer.state for layer in own.layers if isinstance(layer, LinearizedLayer)]
    lengths = next((state.length for state in states if state is not None), None)
    rows = batch if lengths is None else len(lengths)
    if rows not in (1, batch):
        raise LolcatsError(f"expected new tokens for the {rows} texts of the cache, one row each; got {batch} rows")
    given = input_ids.new_ones(batch, new) if attention_mask is None else attention_mask.to(input_ids.device)
    if given.shape not in ((batch, new), (batch, seen + new)):
        raise LolcatsError(
            f"expected an attention mask [{batch}, {new}] of the new tokens, or [{batch}, {seen + new}] of all; "
            f"got {list(given.shape)}"
        )
    if given.shape[1] == new:
        given = torch.cat([_earlier(own, lengths, seen, given).expand(batch, seen), given], 1)
    if rows != batch:
        own.batch_repeat_interleave(batch)
    return {"input_ids": input_ids, "attention_mask": given, "past_key_values": own}


def _earlier(cache: Cache, lengths: Tensor | None, seen: int, like: Tensor) -> Tensor:
    """The mask [rows or 1, seen] of the tokens of a cache, whose padding is taken to be on the left."""
    if lengths is None or bool((lengths == seen).all()):
        return like.new_ones(1, seen)
    if any(getattr(layer, "keys", None) is not None for layer in cache.layers):
        raise LolcatsError(
            "the texts of the cache have padding, and layers with softmax attention must know where; pass the "
            "attention mask of all tokens, those of the cache and the new ones"
        )
    columns = torch.arange(seen, device=like.device)
    return (columns >= seen - lengths.to(like.device)[:, None]).to(like.dtype)
