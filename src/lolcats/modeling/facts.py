"""What a mask, or what stands in for one, says of the new tokens: padding and packed texts, or a refusal.

A linearized layer is causal, with padding left out and packed texts kept apart. A mask that says anything else is
refused in words. That takes a look at its values, once in a forward pass; code that is being compiled or recorded as a
CUDA graph trusts the mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lolcats.errors import LolcatsError
from lolcats.modeling.cache import Past
from lolcats.modeling.masks import HIDDEN, TokenFacts, visible_keys
from lolcats.modeling.passes import Remembered, looks_at_values, version

NOTHING = TokenFacts(None, None)
_facts: Remembered[TokenFacts] = Remembered()
_texts: Remembered[Tensor | None] = Remembered()

DEAF = ("eager", "sdpa", "flex_attention")
"""Attention implementations of transformers that do not look at cu_seq_lens."""
REASONS = (
    "shows tokens to others before them",
    "shows tokens of padding, which do not see themselves, to others",
    "shows places of the cache that are not filled yet",
    "hides some earlier tokens of the same text (as a sliding window or a tree does)",
    "has padding, or another text, in the middle of a packed text",
    "starts a new text behind those in the cache; give each text a cache of its own, or pack them without one",
    "hides tokens that are in the state of the cache, or shows some that are not",
)
WHAT_TO_DO = "a linearized layer is causal and knows padding and packed texts only; use such a mask, or the teacher"


def read_facts(mask: Tensor | None, batch: int, tokens: int, past: Past, texts: Tensor | None = None) -> TokenFacts:
    """Facts of the new tokens from whatever mask the model made.

    Args:
        mask: None, a result of `token_mask`, a 2D bool mask of flash attention, or a [B, h, N, kv] mask (bool, or
            additive with 0 = visible).
        batch: B; tokens: N.
        past: what the layer's cache holds.
        texts: [B, N], numbers of packed texts where something besides the mask tells them (`read_texts`).

    Raises:
        LolcatsError: the mask says what a linearized layer cannot do; the message says what.
    """
    if mask is None:
        return _without_mask(texts, past)
    if mask.ndim == 2 and mask.dtype == torch.int32:
        facts = TokenFacts(None, mask.long())
    else:
        _check_form(mask, batch, tokens)
        if looks_at_values():
            context = (past.passes, past.cache, batch, tokens, version(mask))
            facts = _facts.get(mask, context, lambda: _judged(mask, batch, tokens, past))
        else:
            facts = _trusted(mask, tokens, past)
    if texts is not None and looks_at_values():
        _check_same_texts(facts, texts)
    return facts


def _check_same_texts(facts: TokenFacts, texts: Tensor) -> None:
    """Refuse packed texts that the mask tells otherwise."""
    told = torch.zeros_like(texts) if facts.segments is None else facts.segments
    starts = [x[:, 1:] != x[:, :-1] for x in (texts, told)]
    if not torch.equal(*starts):
        raise LolcatsError("cu_seq_lens and the attention mask tell different texts; leave one of them out")


def _without_mask(texts: Tensor | None, past: Past) -> TokenFacts:
    whole = past.whole or past.length is None
    if not whole and looks_at_values():  # rows that had padding may have been dropped since
        whole = bool((past.length == past.seen).all())
    if not whole:
        raise LolcatsError(
            "no attention mask means that all earlier tokens are seen, but some of them were padding or of another "
            "text; pass the mask of all tokens, those in the cache included"
        )
    return TokenFacts(None, texts) if texts is not None else NOTHING


def _check_form(mask: Tensor, batch: int, tokens: int) -> None:
    """Refuse shapes and types that are no mask's."""
    if mask.ndim == 1:
        raise LolcatsError(
            "a linearized layer got the mask of a local (sliding window) layer; leave it out by `layers`"
        )
    square = mask.ndim == 4 and mask.shape[2] == tokens
    if not (square or (mask.ndim == 2 and mask.dtype == torch.bool)) or mask.shape[0] not in (1, batch):
        raise LolcatsError(
            f"expected an attention mask [{batch}, kv] or [{batch}, 1, {tokens}, kv]; got {tuple(mask.shape)}"
        )
    if mask.ndim == 4:
        visible_keys(mask[..., :0])


def _trusted(mask: Tensor, tokens: int, past: Past) -> TokenFacts:
    """Facts of a mask that is padding or packed texts, without a look at its values."""
    if mask.ndim == 2:
        return TokenFacts(_own_columns(mask[:, None], tokens, past.seen)[:, 0], None)
    visible = visible_keys(mask)[:, 0]
    own = _own_columns(visible, tokens, past.seen).diagonal(dim1=1, dim2=2)
    if past.cached:
        return TokenFacts(own, None)
    return TokenFacts(None, torch.where(own, visible.long().argmax(-1), -1))


def _own_columns(mask: Tensor, tokens: int, seen: int | Tensor) -> Tensor:
    """Columns of the new tokens in a mask [B, rows, kv]: [B, rows, tokens]."""
    if isinstance(seen, Tensor):
        return mask.index_select(2, torch.arange(tokens, device=mask.device) + seen.to(mask.device))
    return mask[:, :, seen : seen + tokens]


def _judged(mask: Tensor, batch: int, tokens: int, past: Past) -> TokenFacts:
    """Facts of a mask whose every value is accounted for."""
    seen = int(past.seen)
    if mask.shape[-1] < seen + tokens or (mask.shape[-1] > tokens and not past.cached):
        raise LolcatsError(
            f"expected an attention mask of {seen + tokens} columns ({seen} tokens in the cache, {tokens} new); got "
            f"{mask.shape[-1]}"
        )
    mask = mask.expand(batch, *mask.shape[1:])
    if mask.ndim == 2:
        held = mask[:, :seen].sum(-1)
        _refuse([False] * 6 + [past.length is not None and bool((held != past.length.to(held.device)).any())])
        return TokenFacts(mask[:, seen : seen + tokens].clone(), None)
    return _judged_square(_one_head(mask), seen, tokens, past)


def _one_head(mask: Tensor) -> Tensor:
    """The keys [B, N, kv] that a mask [B, h, N, kv] shows, the same to all heads."""
    visible = visible_keys(mask)
    if not mask.dtype == torch.bool and bool((~visible & ~(mask <= HIDDEN)).any()):
        raise LolcatsError(f"the attention mask adds a bias to scores (numbers other than 0 and -inf); {WHAT_TO_DO}")
    if visible.shape[1] > 1 and bool((visible != visible[:, :1]).any()):
        raise LolcatsError(f"the attention mask is not the same for all heads; {WHAT_TO_DO}")
    return visible[:, 0]


def _judged_square(visible: Tensor, seen: int, tokens: int, past: Past) -> TokenFacts:
    earlier, own, later = visible.tensor_split((seen, seen + tokens), -1)
    real = own.diagonal(dim1=1, dim2=2).clone()  # [B, N]: padding does not see itself
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=visible.device).tril()
    first = own.byte().argmax(-1)  # the token that starts the text
    expected = causal & real[:, None] & (first[:, :, None] == first[:, None])
    query = real[:, :, None]
    none = visible.new_zeros(())
    held = none if past.length is None else (earlier.sum(-1) != past.length.to(visible.device)[:, None])
    several = (real & (first != torch.where(real, first, tokens).amin(-1, keepdim=True))).any()
    segments = torch.where(real, first, -1)
    split = _runs(segments) != (real & (first == torch.arange(tokens, device=first.device))).sum()
    answers = [
        (own & ~causal & query).any(),
        (own & ~real[:, None]).any(),
        (later & query).any(),
        (own & causal & ~expected & query).any() | (expected & ~own & query).any(),
        split & several,
        several & (seen > 0),
        (held & real).any(),
        several,
        split,
    ]
    *wrong, many, holes = torch.stack(answers).tolist()
    _refuse(wrong)
    if many or not (past.cached or holes):
        return TokenFacts(None, segments)
    return TokenFacts(real, None)


def _runs(segments: Tensor) -> Tensor:
    """Number of runs of equal numbers >= 0 in the rows of [B, N]."""
    before = torch.nn.functional.pad(segments[:, :-1], (1, 0), value=-1)
    return ((segments >= 0) & (segments != before)).sum()


def _refuse(wrong: list[bool]) -> None:
    for is_wrong, reason in zip(wrong, REASONS, strict=True):
        if is_wrong:
            raise LolcatsError(f"the attention mask {reason}; {WHAT_TO_DO}")


def read_texts(
    kwargs: dict[str, Any], mask: Tensor | None, batch: int, tokens: int, past: Past, backend: str
) -> Tensor | None:
    """Numbers [B, N] of packed texts where no mask tells them: from cu_seq_lens, or positions that begin again.

    Args:
        kwargs: what the family hands to its attention function besides tensors and mask.
        backend: attention implementation of the layers that keep softmax attention.

    Raises:
        LolcatsError: they contradict each other, or the cache.
    """
    if kwargs.get("is_causal") is False:
        raise LolcatsError(f"is_causal=False asks for attention to later tokens; {WHAT_TO_DO}")
    bounds, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if bounds is not None:
        texts = _from_bounds(bounds, kwargs.get("cu_seq_lens_k"), batch, tokens)
        if texts is not None and (past.cached or (mask is None and backend in DEAF)):
            raise LolcatsError(
                "cu_seq_lens tell packed texts, which neither a cache nor softmax layers with eager, sdpa or flex "
                "attention keep apart by them; pass use_cache=False and position_ids that begin again at each text"
            )
        return texts
    if mask is not None or tokens == 1 or not looks_at_values():
        return None
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] != tokens:
        return None
    texts = _texts.get(positions, (batch, version(positions)), lambda: _from_positions(positions, batch))
    if texts is not None and past.cached:
        raise LolcatsError(
            "position_ids begin again within a row, as those of packed texts do, which the cache would not keep apart; "
            "pass use_cache=False, or a mask that tells the texts"
        )
    return texts


def _from_bounds(bounds: Tensor, of_keys: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """From bounds [texts + 1] in the rows laid end to end; None if there is one text a row."""
    if looks_at_values():
        ends = bounds[[0, -1]].tolist() == [0, batch * tokens] and bool((bounds.diff() >= 0).all())
        if not ends or (of_keys is not None and not torch.equal(of_keys, bounds)):
            raise LolcatsError(
                f"expected cu_seq_lens from 0 to {batch * tokens}, the same of queries and keys; got {bounds.tolist()}"
                + (f" and {of_keys.tolist()}" if of_keys is not None else "")
            )
    place = torch.arange(batch * tokens, device=bounds.device)
    texts = torch.searchsorted(bounds[1:].long().contiguous(), place, right=True).view(batch, tokens)
    return texts if not looks_at_values() or bool((texts != texts[:, :1]).any()) else None


def _from_positions(positions: Tensor, batch: int) -> Tensor | None:
    starts = positions.diff(dim=-1) <= 0
    if not bool(starts.any()):
        return None
    return torch.nn.functional.pad(starts.long().cumsum(-1), (1, 0)).expand(batch, -1)
