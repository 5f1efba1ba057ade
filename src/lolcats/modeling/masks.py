"""Masks between transformers and the operation.

Linearized layers need no [N, N] mask: they need to know which tokens are padding and where a packed text starts. The
mask function registered here gives just that where every attention layer of a model is linearized; where softmax
layers remain, the model builds its ordinary mask and `facts.read_facts` gets the same facts out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from lolcats.errors import LolcatsError
from lolcats.modeling.passes import Remembered

NAME = "lolcats"
"""Name of our attention and mask functions in transformers' interfaces."""
HIDDEN = -1e4
"""Additive masks hide a key by this or less; what is between this and 0 is a bias."""


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
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """Mask function for transformers, as short as the mask allows.

    Returns:
        None: plain causal; bool [B, kv]: padding; int32 [B, N]: packed texts; bool [B, 1, N, kv]: something else, which
        `facts.read_facts` judges; an empty tensor: the mask of a local layer, which no linearized layer may read.
    """
    if local_size is not None:
        return torch.zeros(0, dtype=torch.bool, device=device)
    if mask_function is not causal_mask_function:
        if attention_mask is None and (torch.compiler.is_compiling() or _is_packing(mask_function)):
            return _packed_texts(mask_function, batch_size, q_length, device)
        return sdpa_mask(
            batch_size, q_length, kv_length, cast(int, q_offset), kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=False, device=device, use_vmap=options.get("use_vmap", False),
        )  # fmt: skip
    if attention_mask is None:
        return None
    # Inside a compiled step a look at the values would break the graph, and with it CUDA graphs.
    if not torch.compiler.is_compiling() and attention_mask.dtype == torch.bool and bool(attention_mask.all()):
        return None
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    padded = torch.nn.functional.pad(attention_mask.bool(), (0, max(0, missing)))
    return padded[:, kv_offset : kv_offset + kv_length]


def _is_packing(mask_function: Callable[..., Any]) -> bool:
    """Whether transformers made this function for packed texts, each of which is causal."""
    parts = _enclosed(mask_function).get("mask_functions", ())
    names = [_enclosed(part) for part in parts]
    return (
        len(names) == 2
        and "packed_sequence_mask" in names[0]
        and "position_ids" in names[1]
        and names[1].get("mask_function") is causal_mask_function
    )


def _enclosed(function: Callable[..., Any]) -> dict[str, Any]:
    """The variables that a function brought from where it was made."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return {name: cell.cell_contents for name, cell in zip(names, function.__closure__ or (), strict=True)}


def _packed_texts(mask_function: Callable[..., Any], batch: int, tokens: int, device: torch.device | str) -> Tensor:
    """[B, N] numbers of the texts: token i starts one where it may not see token i - 1."""
    rows, zero = torch.arange(batch, device=device)[:, None], torch.zeros((), dtype=torch.long, device=device)
    query = torch.arange(1, tokens, device=device)[None]
    starts = ~mask_function(rows, zero, query, query - 1)
    return torch.nn.functional.pad(starts.cumsum(-1, dtype=torch.int32), (1, 0)).expand(batch, -1)


_dense: Remembered[Tensor] = Remembered()


def plain_tensor(mask: Any) -> Tensor | None:
    """The mask as a tensor: a BlockMask of flex_attention is written out, bool [B, 1, N, kv], once in a pass."""
    if mask is None or isinstance(mask, Tensor):
        return mask
    if not isinstance(mask, BlockMask):
        raise LolcatsError(f"expected an attention mask that is a tensor or a BlockMask; got {type(mask).__name__}")

    def write_out() -> Tensor:
        batch, heads = mask.kv_num_blocks.shape[:2]
        return create_mask(mask.mask_mod, batch, heads, *mask.seq_lengths, device=str(mask.kv_num_blocks.device))

    return _dense.get(mask, (), write_out)


def visible_keys(mask: Tensor) -> Tensor:
    """Which keys a bool or additive mask [B, h, N, kv] shows.

    Raises:
        LolcatsError: the type of its numbers cannot be a mask's.
    """
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point():
        return mask == 0
    raise LolcatsError(
        f"expected a 4D attention mask that is bool (True is visible) or additive (0 is visible); got {mask.dtype}"
    )


def softmax_mask(
    facts: TokenFacts,
    mask: Tensor | None,
    tokens: int,
    keys: int,
    seen: int | Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor | None:
    """A mask that SDPA takes for the softmax of the same tokens: [B or 1, 1 or H, N, keys], or None (plain causal).

    Args:
        facts: of the tokens; mask: from which they were read.
        keys: of the cache and the new tokens together; a static cache has room for more behind them.
        seen: column of the first new token; None is `keys - tokens`.
        device: where the tokens are.
    """
    if mask is not None and mask.ndim == 4:
        return _checked_square(mask, tokens, keys)
    seen = keys - tokens if seen is None else seen
    at_end = not isinstance(seen, Tensor) and seen + tokens == keys
    if facts.padding is None and facts.segments is None and at_end and (seen == 0 or tokens == 1):
        return None
    column = torch.arange(keys, device=device)
    query = (torch.arange(tokens, device=device) + seen)[:, None]
    visible = (column <= query)[None]
    if facts.segments is not None:
        document = torch.nn.functional.pad(facts.segments, (0, keys - tokens), value=-1)
        visible = visible & (facts.segments[:, :, None] == document[:, None, :])
    if mask is not None and facts.padding is not None:
        visible = visible & torch.nn.functional.pad(mask, (0, keys - mask.shape[1]))[:, None, :]
    # A padded query would see nothing, which softmax turns into NaN: let it see itself.
    visible = visible | (column == query)
    return visible[:, None]


def _checked_square(mask: Tensor, tokens: int, keys: int) -> Tensor:
    visible_keys(mask[..., :0])
    if mask.shape[2:] != (tokens, keys):
        raise LolcatsError(
            f"expected a 4D attention mask [batch, heads, {tokens}, {keys}] ({tokens} new tokens, {keys} with those in "
            f"the cache); got {tuple(mask.shape)}"
        )
    return mask


AttentionMaskInterface.register(NAME, token_mask)
