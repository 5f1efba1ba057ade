"""Masks between transformers and the operation.

Linearized layers need no [N, N] mask: they need to know which tokens are padding and where a packed text starts. The
mask function registered here gives just that where every attention layer of a model is linearized; where softmax
layers remain, the model builds its ordinary mask and `read_mask` gets the same facts out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

NAME = "lolcats"
"""Name of our attention and mask functions in transformers' interfaces."""


class TokenFacts(NamedTuple):
    """What a mask says of the N new tokens; None means that there is nothing to say."""

    padding: Tensor | None
    """[B, N] bool, False at padding."""
    segments: Tensor | None
    """[B, N] int64, equal numbers for tokens of one packed text, negative at padding."""


def token_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """Mask function for transformers: bool [B, kv] (padding), int64 [B, N] (packed texts) or None (neither)."""
    if mask_function is not causal_mask_function and attention_mask is None:
        # The texts are packed: token i starts a text where it may not see token i - 1.
        rows, zero = torch.arange(batch_size, device=device)[:, None], torch.zeros((), dtype=torch.long, device=device)
        query = torch.arange(1, q_length, device=device)[None]
        starts = ~mask_function(rows, zero, query, query - 1)
        return torch.nn.functional.pad(starts.long().cumsum(-1), (1, 0)).expand(batch_size, -1)
    if attention_mask is None:
        return None
    # Inside a compiled step a look at the values would break the graph, and with it CUDA graphs.
    if not torch.compiler.is_compiling() and attention_mask.dtype == torch.bool and bool(attention_mask.all()):
        return None
    return attention_mask.bool()


def read_mask(mask: Tensor | None, tokens: int, use_segments: bool, offset: int | Tensor | None = None) -> TokenFacts:
    """Facts of the new tokens from whatever mask the model made.

    Args:
        mask: None, a result of `token_mask`, or a [B, 1, N, kv] causal mask (bool, or additive with 0 = visible).
        tokens: N.
        offset: column of the first new token, where the mask has columns for tokens to come (static caches); None
            if the new tokens have the last columns.
        use_segments: read packed texts out of a [B, 1, N, kv] mask; False with a cache, where texts are not packed.
    """
    if mask is None:
        return TokenFacts(None, None)
    if mask.ndim == 2:
        if mask.dtype == torch.bool:
            return TokenFacts(_own_columns(mask[:, None], tokens, offset)[:, 0], None)
        return TokenFacts(None, mask)
    if mask.ndim != 4:
        raise ValueError(f"expected an attention mask of 2 or 4 dimensions; got {tuple(mask.shape)}")
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    own = _own_columns(visible, tokens, offset).diagonal(dim1=1, dim2=2)
    if not use_segments:
        return TokenFacts(own, None)
    first = visible.long().argmax(-1)
    return TokenFacts(None, torch.where(own, first, -1))


def _own_columns(mask: Tensor, tokens: int, offset: int | Tensor | None) -> Tensor:
    """Columns of the new tokens in a mask [B, rows, kv]: [B, rows, tokens]."""
    if offset is None:
        return mask[:, :, -tokens:]
    return mask.index_select(2, torch.arange(tokens, device=mask.device) + offset)


def softmax_mask(facts: TokenFacts, mask: Tensor | None, tokens: int, keys: int) -> Tensor | None:
    """A mask that SDPA takes for the softmax of the same tokens: bool [B or 1, 1, N, keys], or None (plain causal)."""
    if mask is not None and mask.ndim == 4:
        return mask
    if facts.padding is None and facts.segments is None and (tokens == keys or tokens == 1):
        return None
    device = next((f.device for f in facts if f is not None), torch.device("cpu"))
    query = torch.arange(keys - tokens, keys, device=device)[:, None]
    visible = (torch.arange(keys, device=device) <= query)[None]
    if facts.segments is not None:
        visible = visible & (facts.segments[:, :, None] == facts.segments[:, None, :])
    if mask is not None and facts.padding is not None:
        visible = visible & mask[:, None, :]
    # A padded query would see nothing, which softmax turns into NaN: let it see itself.
    visible = visible | (torch.arange(keys, device=device) == query)
    return visible[:, None]


AttentionMaskInterface.register(NAME, token_mask)
