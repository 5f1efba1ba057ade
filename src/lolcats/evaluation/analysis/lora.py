"""What stage 2 did to the weights: the update scale B A of each linear layer, at the steps that were kept."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from lolcats.evaluation.analysis.file import LoraModule
from lolcats.training.update_size import update_size

MATRIX = re.compile(r"^(?P<module>.*)\.lora_(?P<side>[AB])(?:\.[^.]+)?(?:\.weight)?$")
"""A matrix of an adapter as peft names it, in a model or in a file."""
LAYER = re.compile(r"(?:^|\.)(?P<layer>\d+)\.(?P<rest>.+)$")


def lora_modules(steps: Mapping[int, Mapping[str, Tensor]], scale: float) -> list[LoraModule]:
    """Norm and effective rank by layer, projection and step.

    Args:
        steps: step -> name -> matrix A [r, in] or B [out, r] of adapters; other tensors are left out.
        scale: alpha / r.
    """
    found: dict[str, LoraModule] = {}
    for step, tensors in sorted(steps.items()):
        for module, (down, up) in _pairs(tensors).items():
            if module not in found:
                layer, projection = _place(module)
                found[module] = LoraModule(layer=layer, projection=projection, steps=[], norm=[], effective_rank=[])
            norm, rank = update_size(down, up, scale)
            row = found[module]
            row.steps.append(step)
            row.norm.append(norm)
            row.effective_rank.append(rank)
    _tell_apart(found)
    return sorted(found.values(), key=lambda row: (row.layer, row.projection))


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := MATRIX.match(name):
            sides.setdefault(match["module"], {})[match["side"]] = tensor
    return {module: (both["A"], both["B"]) for module, both in sides.items() if len(both) == 2}


def _place(module: str) -> tuple[int, str]:
    """Number of the layer, and the last name; -1 for what is in no layer."""
    match = LAYER.search(module)
    return (int(match["layer"]) if match else -1), module.rpartition(".")[2]


def _tell_apart(found: Mapping[str, LoraModule]) -> None:
    """Call projections of a layer that are named alike, as those of experts, by all that follows the layer's number."""
    names = [(row.layer, row.projection) for row in found.values()]
    for (module, row), name in zip(found.items(), names, strict=True):
        if names.count(name) > 1 and (match := LAYER.search(module)):
            row.projection = match["rest"]
