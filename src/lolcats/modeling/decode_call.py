"""Which forward passes are decoding steps that may be replayed (`decode_graphs`), and which read prompts
(`fused_prompts`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from lolcats.modeling.cache import LinearizedLayer
from lolcats.modeling.inputs import own_positions

TENSORS = ("input_ids", "attention_mask", "position_ids")
SETTINGS = ("use_cache", "return_dict", "output_attentions", "output_hidden_states")
"""What a call may ask for, and what the model's configuration says where a call does not."""


class Call(NamedTuple):
    """A forward pass over one more token of each text."""

    ids: Tensor
    """[B, 1]."""
    mask: Tensor | None
    """[B, seen + 1], 0 at padding."""
    positions: Tensor | None
    """[B or 1, 1]."""
    cache: DynamicCache
    layers: list[Any]
    """Of the cache, all of them linearized and with a state."""
    seen: int
    """Tokens in the cache."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """What differs between recordings: the batch and where it runs."""
        device = self.ids.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return len(self.ids), device, stream

    def own_positions(self) -> Tensor:
        """[B, 1] int64: the positions of the call, or those that a forward pass would count."""
        if self.positions is not None:
            return self.positions.expand_as(self.ids).to(torch.long)
        if self.mask is not None:
            return own_positions(self.mask, 1, self.seen)
        return torch.full_like(self.ids, self.seen, dtype=torch.long)

    def is_plain(self) -> bool:
        """Whether the mask says no more than what the state knows: all that is not padding is seen."""
        if self.mask is None:
            return all(layer.whole for layer in self.layers)
        ones = self.mask == 1
        lengths = self.layers[0].state.length
        checks = (ones | (self.mask == 0)).all(), ones[:, -1].all(), (ones.sum(-1) == lengths + 1).all()
        return bool(torch.stack(checks).all())


def read_call(given: dict[str, Any], config: Any, device: str) -> Call | None:
    """What a call of the model's forward asks for, or None where it is no plain decoding step on such a device."""
    given = {name: value for name, value in given.items() if value is not None}
    cache, ids = given.pop("past_key_values", None), given.get("input_ids")
    if type(cache) is not DynamicCache or not isinstance(ids, Tensor) or ids.device.type != device:
        return None
    ids, mask, positions = (given.pop(name, None) for name in TENSORS)
    layers: list[Any] = cache.layers
    if (
        not _asks_no_more(given, config)
        or ids.ndim != 2
        or ids.shape[1] != 1
        or not layers
        or getattr(cache, "offloading", False)
    ):
        return None
    if not all(type(layer) is LinearizedLayer and layer.state is not None for layer in layers):
        return None
    rows, seen = len(ids), layers[0].seen
    if any(layer.seen != seen or len(layer.state.length) != rows for layer in layers):
        return None
    if mask is not None and (mask.shape != (rows, seen + 1) or mask.device != ids.device):
        return None
    if positions is not None and positions.shape not in ((rows, 1), (1, 1)):
        return None
    return Call(ids, mask, positions, cache, layers, seen)


def is_prompt(given: dict[str, Any], config: Any, device: str) -> bool:
    """Whether a call reads several tokens of each text on such a device, and asks for logits and a cache alone."""
    given = {name: value for name, value in given.items() if value is not None}
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.device.type != device or ids.ndim != 2 or ids.shape[1] < 2:
        return False
    for name in ("past_key_values", *TENSORS):
        given.pop(name, None)
    return _asks_no_more(given, config)


def _asks_no_more(given: dict[str, Any], config: Any) -> bool:
    """Whether what is left of a call's arguments asks for logits and a cache alone."""
    asked = [given.pop(name, getattr(config, name, False)) for name in SETTINGS]
    last = given.pop("logits_to_keep", 0)
    return asked == [True, True, False, False] and isinstance(last, int) and last >= 0 and not given
