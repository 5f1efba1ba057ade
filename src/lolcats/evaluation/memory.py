"""What one text takes in memory, layer by layer, in bytes and in tokens of the teacher's keys and values.

A KV token of a layer is what softmax attention would keep there for one token: keys and values of all key heads. So a
state of n bytes is worth n / (bytes of a KV token) tokens, and a window of so many tokens costs the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from lolcats.modeling import LinearizedAttention, linearized_layers
from lolcats.printable import show_bytes

PARTS = {"sinks": ("sinks",), "window": ("window", "ring"), "kept": ("kept",)}
"""Part of a state -> words of which one is in the names of its tensors; all others are "state"."""


SMALLEST_PART = 0.05
"""KV tokens below which a part is not told: the length of the text is one."""


class LayerMemory(BaseModel):
    """One linearized layer."""

    model_config = ConfigDict(extra="allow")

    layer: int
    bytes: int
    """Of the state of one text, however long it is."""
    kv_token_bytes: int
    """What the teacher keeps there for one token."""
    kv_tokens: float
    parts: dict[str, float] = {}
    """What they are for, in KV tokens: "sinks", "window", "kept" (pairs that left the window), "state"."""


class TextMemory(BaseModel):
    """All linearized layers together."""

    model_config = ConfigDict(extra="allow")

    bytes: int
    kv_tokens: float
    """Tokens whose keys and values take as much in the same layers of the teacher."""
    layers: list[LayerMemory]

    def line(self) -> str:
        """The sums in words."""
        whole = sum(layer.kv_token_bytes for layer in self.layers)
        names = dict.fromkeys(part for layer in self.layers for part in layer.parts)
        sums = {n: sum(layer.parts.get(n, 0) * layer.kv_token_bytes for layer in self.layers) / whole for n in names}
        split = ", ".join(f"{name} {tokens:,.1f}" for name, tokens in sums.items())
        return (
            f"memory of a text: {show_bytes(self.bytes)} in {len(self.layers)} linearized layers, as much as "
            f"{self.kv_tokens:,.1f} KV tokens of the teacher" + (f" ({split})" if split else "")
        )


def text_memory(model: PreTrainedModel, dtype: torch.dtype | None = None) -> TextMemory | None:
    """The memory of one text in the linearized layers of a model; None where there are none.

    Args:
        model: in memory or on the meta device.
        dtype: of keys and values; None is that of the model.
    """
    found = [_layer_memory(layer, dtype or model.dtype) for layer in linearized_layers(model)]
    return together(found) if found else None


def together(layers: Iterable[LayerMemory]) -> TextMemory:
    """Layers and their sums."""
    layers = list(layers)
    total, token = sum(layer.bytes for layer in layers), sum(layer.kv_token_bytes for layer in layers)
    return TextMemory(bytes=total, kv_tokens=round(total / token, 2), layers=layers)


def part_of(name: str) -> str:
    """What a tensor of a state is for: a key of `PARTS`, or "state"."""
    return next((part for part, words in PARTS.items() if set(words) & set(name.split("."))), "state")


def _layer_memory(layer: LinearizedAttention, dtype: torch.dtype) -> LayerMemory:
    sizes, spec = layer.mixer.sizes, layer.mixer.state_spec(dtype)
    token = sizes.kv_heads * (sizes.head_dim + sizes.value_dim) * dtype.itemsize
    parts: dict[str, int] = {}
    for name, tensor_bytes in zip(spec.names, spec.sizes, strict=True):
        parts[part_of(name)] = parts.get(part_of(name), 0) + tensor_bytes
    return LayerMemory(
        layer=layer.layer_idx, bytes=spec.nbytes, kv_token_bytes=token, kv_tokens=round(spec.nbytes / token, 2),
        parts={p: round(parts[p] / token, 2) for p in (*PARTS, "state") if parts.get(p, 0) >= SMALLEST_PART * token},
    )  # fmt: skip
