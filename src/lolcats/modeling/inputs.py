"""What a linearized model does with the inputs and outputs of a forward pass, before and after its family's own code.

Two hooks on the family's base model, so that `model(...)`, `model.base_model(...)` and `generate` all pass here.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from lolcats.errors import LolcatsError
from lolcats.modeling.attention import LinearizedAttention
from lolcats.modeling.masks import visible_keys
from lolcats.modeling.modules import calls_interface
from lolcats.modeling.passes import looks_at_values


def install_hooks(model: PreTrainedModel) -> None:
    """Have every forward pass of `model` checked and completed."""
    base: nn.Module = model.base_model
    base.register_forward_pre_hook(prepare_inputs, with_kwargs=True)
    base.register_forward_hook(place_attentions)


def prepare_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Refuse 2D masks that are not padding, and give left-padded rows the positions that they have alone.

    Feature maps see queries and keys after rotary embedding, so that a row's result would otherwise depend on how far
    it is padded, which softmax attention does not notice.
    """
    names = list(inspect.signature(module.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    mask, tokens = given.get("attention_mask"), _tokens(given)
    if not isinstance(mask, Tensor) or tokens is None:
        return args, kwargs
    cache = given.get("past_key_values")
    seen = _seen(cache)
    check_mask(mask, tokens, seen, room=mask.ndim == 2 or getattr(cache, "is_compileable", False))
    if mask.ndim == 4:
        return args, kwargs
    wanted = "position_ids" in names and given.get("position_ids") is None and not has_many_axes(module)
    if not wanted or seen is None or names.index("position_ids") < len(args) or not _pads_left(mask):
        return args, kwargs
    return args, kwargs | {"position_ids": own_positions(mask, tokens.shape[1], seen).to(tokens.device)}


def _tokens(given: dict[str, Any]) -> Tensor | None:
    """The inputs [B, N] or [B, N, d_model], whichever were given."""
    found = next((given[n] for n in ("input_ids", "inputs_embeds") if isinstance(given.get(n), Tensor)), None)
    return found if found is not None and found.ndim in (2, 3) else None


def _seen(cache: Any) -> int | Tensor | None:
    """Tokens in the cache; None where it does not say."""
    if cache is None:
        return 0
    try:
        return cache.get_seq_length()
    except (AttributeError, ValueError):  # not a cache of tokens, or one whose first layer counts none
        return None


def check_mask(mask: Tensor, tokens: Tensor, seen: int | Tensor | None, room: bool) -> None:
    """Refuse a mask whose form does not fit these tokens and those before them, or whose numbers are no padding.

    Args:
        mask: [B, kv] or [B, h, N, kv]; tokens: [B, N] or [B, N, d_model]; seen: tokens in the cache, None if not known.
        room: whether there may be columns for tokens to come.

    Raises:
        LolcatsError: another shape or type, or numbers other than 0 and 1 in two dimensions.
    """
    batch, new = tokens.shape[:2]
    fits = mask.ndim == 2 or (mask.ndim == 4 and mask.shape[2] == new)
    if not fits or mask.shape[0] not in (1, batch):
        raise LolcatsError(
            f"expected an attention mask [{batch}, tokens] or [{batch}, 1, {new}, tokens]; got {tuple(mask.shape)}"
        )
    if mask.ndim == 4:
        visible_keys(mask[..., :0])
    if not looks_at_values():
        return
    missing = 0 if seen is None else int(seen) + new - mask.shape[-1]
    if missing > 0 or (missing < 0 and not room):
        raise LolcatsError(
            f"expected an attention mask of {mask.shape[-1] + missing} columns (the tokens in the cache and {new} new "
            f"ones); got {mask.shape[-1]}"
        )
    if mask.ndim == 2 and mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise LolcatsError(
            "the attention mask holds numbers other than 0 and 1; to tell packed texts by their numbers, pass "
            "position_ids that begin again at each text, no mask and use_cache=False"
        )


def has_many_axes(module: nn.Module) -> bool:
    """Whether positions have several axes (of images, say), which no mask tells."""
    rope = getattr(getattr(module, "config", None), "rope_parameters", None)
    return isinstance(rope, dict) and "mrope_section" in rope


def _pads_left(mask: Tensor) -> bool:
    """Whether a row begins with padding; taken for granted where values may not be looked at."""
    return not looks_at_values() or not bool(mask[:, 0].all())


def own_positions(mask: Tensor, tokens: int, seen: int | Tensor) -> Tensor:
    """Positions [B, N] of the new tokens, counted from the first that is not padding; 0 before it."""
    padding = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    columns = torch.arange(tokens, device=mask.device) + (seen.to(mask.device) if isinstance(seen, Tensor) else seen)
    return (columns - padding).clamp_min(0)


def place_attentions(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Put None into `attentions` where a layer is linearized, so that entry i is that of layer i."""
    weights = output.get("attentions") if isinstance(output, ModelOutput) else None
    if not weights:
        return output
    linearized = _which_are_linearized(module)
    if len(weights) != linearized.count(False):
        raise LolcatsError(
            f"output_attentions: {len(weights)} layers gave attention weights, expected the {linearized.count(False)} "
            "with softmax attention; leave output_attentions out"
        )
    rest = iter(weights)
    output["attentions"] = tuple(None if is_linearized else next(rest) for is_linearized in linearized)
    return output


def _which_are_linearized(module: nn.Module) -> Sequence[bool]:
    """For each attention layer, in order, whether it is linearized."""
    layers: dict[int, bool] = {
        int(cast(Any, m.layer_idx)): isinstance(m, LinearizedAttention)
        for m in reversed(list(module.modules()))
        if isinstance(m, LinearizedAttention) or (getattr(m, "layer_idx", None) is not None and calls_interface(m))
    }
    return [layers[index] for index in sorted(layers)]
