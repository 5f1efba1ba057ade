"""Whether a loaded model is what its files say: every tensor read, and every number finite."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lolcats.errors import LolcatsError
from lolcats.placing import stored_tensors

SHOWN = 3
"""Tensors that a message names."""
PIECE = 2**24
"""Numbers looked at together, so that a check takes no memory of note."""


def check_complete(found: Mapping[str, Any], source: str) -> None:
    """Refuse a model of which something was not read: transformers would go on with random numbers.

    Args:
        found: what `from_pretrained(output_loading_info=True)` tells. Tied weights, and what the family knows that it
            can do without, are left out there.
        source: where the model is from.

    Raises:
        LolcatsError: tensors are missing, have no place in the model or another shape, or could not be read.
    """
    shapes = [f"{n} {list(f)} instead of {list(w)}" for n, f, w in sorted(found.get("mismatched_keys", ()))]
    wrong = {name for name, *_ in found.get("mismatched_keys", ())}
    problems = [
        _several("missing", sorted(set(found.get("missing_keys", ())) - wrong)),
        _several("not part of this model", sorted(found.get("unexpected_keys", ()))),
        _several("of another shape", shapes),
        _several("not readable", [str(message) for message in found.get("error_msgs", ())]),
    ]
    if any(problems):
        raise LolcatsError(
            f"cannot load {source!r}: its weights do not fit its config.json: {'; '.join(filter(None, problems))}; "
            "they are incomplete or belong to another model, copy both again from where they came from"
        )


def _several(what: str, names: Collection[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(list(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{len(names)} {what} ({shown})"


def check_finite(model: nn.Module, source: str) -> None:
    """Refuse weights that hold NaN or infinity.

    Args:
        model: a loaded model, quantized layers with the numbers that they are scaled by.
        source: where it is from.

    Raises:
        LolcatsError: the message names the tensors.
    """
    bad = [name for name, tensor in _numbers(model) if not all_finite(tensor)]
    if bad:
        shown = ", ".join(bad[:SHOWN]) + (", ..." if len(bad) > SHOWN else "")
        raise LolcatsError(
            f"cannot load {source!r}: {len(bad)} of its tensors hold NaN or infinity ({shown}); no result of such a "
            "model means anything; copy it again, or take an earlier checkpoint"
        )


@torch.no_grad()
def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any float type is free of NaN and infinity."""
    for piece in tensor.detach().reshape(-1).split(PIECE):
        # A sum keeps NaN and infinity, and reads the numbers once; only where it is neither is it looked at closely,
        # since the sum of large numbers can be infinite too.
        piece = piece if piece.dtype.itemsize > 1 else piece.float()
        if not piece.sum(dtype=torch.float32).isfinite() and not piece.isfinite().all():
            return False
    return True


def _numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All float tensors of a model by name; of quantized ones, what their integers are multiplied by."""
    for name, tensor in stored_tensors(model):
        if tensor.is_floating_point():
            if tensor.device.type != "meta":
                yield name, tensor
            continue
        state = getattr(tensor, "quant_state", None)
        scales = (getattr(tensor, "SCB", None), getattr(state, "absmax", None), getattr(state, "code", None))
        nested = getattr(getattr(state, "state2", None), "absmax", None)
        for scale in (*scales, nested, getattr(state, "offset", None)):
            if isinstance(scale, Tensor) and scale.is_floating_point():
                yield name, scale
