"""Names of tensors in models, adapters and checkpoints of version 0.1, and where these tensors are now.

0.1 put what it added beside the family's module, `self_attn.feature_q.weight`; it is under `mixer` now.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

ADDED_BY_0_1 = ("feature_q", "feature_k", "window_factor", "query_scale", "decay_gate")
OLD = re.compile(rf"(?<!\.mixer)\.({'|'.join(ADDED_BY_0_1)})(?![^.])")
"""One of them where a name has it as a part of its own, outside a mixer."""

T = TypeVar("T")


def new_name(name: str) -> str:
    """The present name of a tensor: `a.feature_q.weight` -> `a.mixer.feature_q.weight`; others stay."""
    return OLD.sub(r".mixer.\1", name)


def old_name(name: str) -> str:
    """The name that 0.1 gave a tensor."""
    return re.sub(rf"\.mixer\.({'|'.join(ADDED_BY_0_1)})(?![^.])", r".\1", name)


def renamed(tensors: Mapping[str, T]) -> dict[str, T]:
    """A file's tensors by their present names."""
    return {new_name(name): tensor for name, tensor in tensors.items()}


def in_old_order(names: Iterable[str]) -> list[str]:
    """Names of a model's parameters in the order of 0.1, so that sums over all of them are the same to the last bit.

    In each layer the vectors that were added come first, then the family's weights, then feature maps and gate.
    """
    layers: dict[str, int] = {}

    def place(item: tuple[int, str]) -> tuple[int, int]:
        index, name = item
        part = ".inner." if ".inner." in name else ".mixer."
        layer, found, rest = name.partition(part)
        if not found:
            return index, 0
        rank = 1 if part == ".inner." else 2 * ("." in rest)
        return layers.setdefault(layer, index), rank

    return [name for _, name in sorted(enumerate(names), key=place)]


def key_mapping() -> dict[str, str]:
    """The same for `from_pretrained` of transformers: pattern -> what stands in its place."""
    return {rf"(?<!\.mixer)\.{name}": f".mixer.{name}" for name in ADDED_BY_0_1}


def without_renaming(loaded: Any) -> Any:
    """What `from_pretrained` returned, saved again by the present names: transformers would give back the old ones."""
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    kept = getattr(model, "_weight_conversions", None)
    if kept is not None:
        ours = set(key_mapping().values())
        model._weight_conversions = [c for c in kept if not ours.issuperset(getattr(c, "target_patterns", ()) or ("",))]
    return loaded
