"""What one text takes in memory, layer by layer, in bytes and in tokens of the teacher's keys and values.

A KV token of a layer is what softmax attention would keep there for one token: keys and values of all key heads. So a
state of n bytes is worth n / (bytes of a KV token) tokens, and a window of so many tokens costs the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from lolcats.modeling import LinearizedAttention, linearized_layers
from lolcats.modeling.convert import head_sizes
from lolcats.ops import hybrid_attention
from lolcats.printable import show_bytes


class LayerMemory(BaseModel):
    """One linearized layer."""

    model_config = ConfigDict(extra="allow")

    layer: int
    bytes: int
    """Of the state of one text, however long it is."""
    kv_token_bytes: int
    """What the teacher keeps there for one token."""
    kv_tokens: float


class TextMemory(BaseModel):
    """All linearized layers together."""

    model_config = ConfigDict(extra="allow")

    bytes: int
    kv_tokens: float
    """Tokens whose keys and values take as much in the same layers of the teacher."""
    layers: list[LayerMemory]

    def line(self) -> str:
        """The sums in words."""
        return (
            f"memory of a text: {show_bytes(self.bytes)} in {len(self.layers)} linearized layers, as much as "
            f"{self.kv_tokens:,.1f} KV tokens of the teacher"
        )


def text_memory(model: PreTrainedModel, dtype: torch.dtype | None = None) -> TextMemory | None:
    """The memory of one text in the linearized layers of a model; None where there are none.

    Args:
        model: in memory or on the meta device.
        dtype: of keys and values; None is that of the model.
    """
    config = model.config.get_text_config(decoder=True)
    found = [_layer_memory(layer, config, dtype or model.dtype) for layer in linearized_layers(model)]
    return together(found) if found else None


def together(layers: Iterable[LayerMemory]) -> TextMemory:
    """Layers and their sums."""
    layers = list(layers)
    total, token = sum(layer.bytes for layer in layers), sum(layer.kv_token_bytes for layer in layers)
    return TextMemory(bytes=total, kv_tokens=round(total / token, 2), layers=layers)


def _layer_memory(layer: LinearizedAttention, config: Any, dtype: torch.dtype) -> LayerMemory:
    _, kv_heads, size = head_sizes(layer.inner, config)
    values = getattr(layer.inner, "v_head_dim", None) or size
    token, held = kv_heads * (size + values) * dtype.itemsize, state_bytes(layer, config, dtype)
    return LayerMemory(layer=layer.layer_idx, bytes=held, kv_token_bytes=token, kv_tokens=round(held / token, 2))


def state_bytes(layer: LinearizedAttention, config: Any, dtype: torch.dtype) -> int:
    """Bytes of the state of one text in one layer, as the operation itself makes it."""
    heads, kv_heads, size = head_sizes(layer.inner, config)
    maps = layer.feature_k.heads if layer.feature_k.learned else kv_heads
    maps = heads if layer.decay_gate is not None else maps
    settings = layer.settings
    query, key = torch.zeros(1, heads, 1, size, dtype=dtype), torch.zeros(1, kv_heads, 1, size, dtype=dtype)
    value = torch.zeros(1, kv_heads, 1, getattr(layer.inner, "v_head_dim", None) or size, dtype=dtype)
    state = hybrid_attention(
        query, key, value, torch.zeros(1, heads, 1, layer.feature_q.features),
        torch.zeros(1, maps, 1, layer.feature_k.features), torch.zeros(heads),
        window=settings.window, window_kind=settings.window_kind, sinks=settings.sinks,
        log_decay=None if layer.decay_gate is None else torch.zeros(1, heads, 1), return_state=True,
    ).state  # fmt: skip
    assert state is not None
    return state._replace(window=state.window._replace(phi_k=None)).nbytes
