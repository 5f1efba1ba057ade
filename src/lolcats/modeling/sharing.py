"""Layers that attend to the keys and values of another layer (Gemma 3n, Gemma 4).

A linearized source layer hands on the keys and values of the new tokens alone, and each sharing layer folds them into a
state of its own. A softmax layer would need those of all tokens, so the layers that share are linearized together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lolcats.errors import LolcatsError


def sharing_groups(config: Any) -> list[list[int]]:
    """Indices of the layers that share keys and values, the source first; empty where no layer does."""
    modes, types = getattr(config, "kv_sharing_modes", None), getattr(config, "layer_types", None)
    if not modes or not types:
        return []
    groups: dict[str, list[int]] = {}
    for index, (mode, kind) in enumerate(zip(modes, types, strict=True)):
        if mode is not None:
            groups.setdefault(kind, []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def check_sharing(config: Any, chosen: list[int]) -> None:
    """Raise LolcatsError where layers that share keys and values would be linearized in part."""
    for group in sharing_groups(config):
        own = [index for index in group if index in chosen]
        if own and own != group:
            raise LolcatsError(
                f"layers {group} share the keys and values of layer {group[0]} (num_kv_shared_layers = "
                f"{config.num_kv_shared_layers}), so all of them or none are linearized; `layers` takes {own}"
            )


def keep_all_queries(model: nn.Module, config: Any, chosen: list[int]) -> None:
    """Let a model whose sharing layers are linearized run them on all tokens of a prompt.

    Such a family drops the tokens whose logits nobody asks for before its sharing layers, where softmax attention needs
    the keys alone. A linearized layer takes each token into its state, and a decay gate looks at its hidden state.
    """
    if any(group[0] in chosen for group in sharing_groups(config)):
        model.register_forward_pre_hook(_indices_for_counts, with_kwargs=True)


def _indices_for_counts(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    count = kwargs.get("logits_to_keep", 0)
    tokens = next((x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]) if x is not None), None)
    if not isinstance(count, int) or count <= 0 or tokens is None:
        return None
    # The families drop tokens for a count only, and take indices of the logits to make as well.
    length = tokens.shape[1]
    return args, kwargs | {"logits_to_keep": torch.arange(max(0, length - count), length, device=tokens.device)}
