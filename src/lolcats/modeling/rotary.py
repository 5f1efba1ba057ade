"""How a family rotates q and k, found out by arithmetic: what it makes with angles of zero is what there was before.

Families hand cosines and sines to their attention modules and apply them in ways of their own. So the module is run
twice on the same hidden states, with its own `position_embeddings` and with those of no rotation (1 and 0). The layout
by which the one result follows from the other is the family's; where there is none, its rotation cannot be undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.mixers import Rotation
from lolcats.mixers.rotation import Layout, layouts
from lolcats.modeling.calls import attention_named
from lolcats.modeling.head import probe_ids

CAPTURE = "lolcats_capture"
"""Name of the attention function that only keeps q and k."""
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Relative: what rounding does; some families rotate in float32 whatever the model is. Another layout is off by more,
unless the angles are all small."""
DECIDED = 10
"""By how much the second best layout must be worse for the best one to be kept."""


@torch.no_grad()
def check_rotations(model: PreTrainedModel, names: Mapping[int, str]) -> None:
    """See on a text of a few tokens that the rotations of some attention modules can be undone.

    Args:
        model: not converted.
        names: of the modules, by layer.

    Raises:
        LolcatsError: as `RotaryFinder.find`.
    """
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((module, args, kwargs)), with_kwargs=True
        )
        for name in names.values()
    ]
    was_training = model.training
    try:
        model.eval()
        model(input_ids=probe_ids(model), use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    for module, args, kwargs in calls:
        RotaryFinder().find(module, args, kwargs)


class RotaryFinder:
    """The layout of one attention module; looked for at each call until the angles of a text decide it."""

    def __init__(self) -> None:
        self.layout: Layout | None = None

    @torch.no_grad()
    def find(self, inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rotation:
        """The rotation of a call of the module `inner`.

        Raises:
            LolcatsError: no rotary embeddings are handed over, in a form that is not known, or they do more than
                rotate; the message says which.
        """
        cos, sin = _cos_and_sin(inner, kwargs.get("position_embeddings"))
        if self.layout is not None:
            return Rotation(cos, sin, self.layout)
        if torch.compiler.is_compiling():
            raise LolcatsError("the rotary embedding is not known yet; run the model once before it is compiled")
        rotated = _queries_and_keys(inner, args, kwargs)
        plain = (torch.ones_like(cos), torch.zeros_like(sin))
        before = _queries_and_keys(inner, args, {**kwargs, "position_embeddings": plain})
        errors = _errors(cos, sin, rotated, before)
        best = min(errors, key=lambda layout: errors[layout])
        if not errors[best] <= TOLERANCES[rotated[0].dtype]:
            raise LolcatsError(
                f"the rotary embedding of {type(inner).__name__} cannot be undone: expected q and k as they were "
                f"before it, and the best of {len(errors)} layouts is off by {errors[best]:.2g} (relative); take a "
                "mixer that does not need this, or leave the layer out with `layers`"
            )
        rest = [error for layout, error in errors.items() if layout != best]
        if not rest or min(rest) > DECIDED * max(errors[best], torch.finfo(rotated[0].dtype).eps):
            self.layout = best
        return Rotation(cos, sin, best)


def _cos_and_sin(inner: nn.Module, embeddings: Any) -> tuple[Tensor, Tensor]:
    """The two tensors [B or 1, N, P] that a family hands over."""
    name = type(inner).__name__
    if embeddings is None:
        raise LolcatsError(
            f"{name} is given no rotary embeddings (position_embeddings), so what q and k were before them is not "
            "known; take a mixer that does not need this, or leave the layer out with `layers`"
        )
    pair = embeddings if isinstance(embeddings, tuple | list) else (embeddings,)
    if len(pair) != 2 or not all(isinstance(t, Tensor) and t.ndim == 3 and t.is_floating_point() for t in pair):
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in pair]
        raise LolcatsError(
            f"{name} is given rotary embeddings of another form: expected cosines and sines [batch, tokens, angles]; "
            f"got {shapes}. Take a mixer that does not need them, or leave the layer out with `layers`"
        )
    return pair[0], pair[1]


def _errors(
    cos: Tensor, sin: Tensor, rotated: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]
) -> dict[Layout, float]:
    """Relative distance of q and k from what they were, by each layout that the sizes allow."""
    errors: dict[Layout, float] = {}
    for layout in layouts(cos.shape[-1], rotated[0].shape[-1]):
        rotation = Rotation(cos, sin, layout)
        errors[layout] = max(_distance(rotation.undo(x), y) for x, y in zip(rotated, before, strict=True))
    return errors


def _distance(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    return float((x - y).norm() / y.norm().clamp_min(1e-30))


def _queries_and_keys(inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the module hands to its attention function."""
    found: list[tuple[Tensor, Tensor]] = []
    with _capturing(inner, found):
        inner(*args, **kwargs)
    assert len(found) == 1, f"{type(inner).__name__} called its attention {len(found)} times"
    return found[0]


@contextmanager
def _capturing(inner: nn.Module, found: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    def keep(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        found.append((query, key))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(CAPTURE, keep)
    with attention_named(inner, CAPTURE):
        yield
