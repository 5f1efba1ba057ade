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
from lolcats.mixers import Reach, Rotation
from lolcats.mixers.rotation import Layout, layouts
from lolcats.modeling.calls import attention_named
from lolcats.modeling.head import probe_ids
from lolcats.models.context import context_limit

ROUNDED = 0.02
"""What angles of a call may be off by: of late positions float32 has lost a part, and models round to bfloat16."""
ROTARY = "RotaryEmbedding"
"""How the classes end that make angles."""
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
    looking = False

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal looking
        if not looking:  # it runs the module itself
            looking = True
            RotaryFinder().find(module, args, kwargs)
            looking = False

    # At its own time in the pass: weights that are sharded are whole then.
    hooks = [model.get_submodule(name).register_forward_pre_hook(look, with_kwargs=True) for name in names.values()]
    was_training = model.training
    try:
        model.eval()
        model(input_ids=probe_ids(model), use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()


class RotaryFinder:
    """The layout of one attention module; looked for at each call until the angles of a text decide it."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self._limit: int | None = None
        self._sources: list[nn.Module] = []
        self._reach: Reach | None = None

    def look_in(self, model: PreTrainedModel) -> None:
        """Tell it where the model makes its angles, and the length of its context."""
        self._limit = context_limit(model)
        self._sources = [m for m in model.modules() if type(m).__name__.endswith(ROTARY)]

    @property
    def is_decided(self) -> bool:
        """Whether later calls find out nothing more."""
        return self.layout is not None and not self._sources

    @property
    def known_reach(self) -> Reach | None:
        """What `reach` found, if it did."""
        return self._reach

    @torch.no_grad()
    def reach(self, rotation: Rotation, position_ids: Tensor | None) -> Reach | None:
        """How far the model was made to look back; None where that, or how it makes its angles, is not known.

        Args:
            rotation: of a call; position_ids: [B or 1, N], its positions.
        """
        if self._reach is None and self._sources and not torch.compiler.is_compiling():
            if self._limit is not None and self.layout is not None and position_ids is not None:
                self._reach = _find_reach(self._sources, self._limit, rotation, position_ids)
            self._sources = self._sources if self.layout is None else []  # decided, one way or the other
        return self._reach

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


def _find_reach(sources: list[nn.Module], limit: int, rotation: Rotation, position_ids: Tensor) -> Reach | None:
    """The angles at the last position, from those frequencies of a module that give the angles of a call."""
    layout = rotation.layout._replace(angles="single")
    for module in sources:
        for frequencies, scale in _frequencies(module):
            cos, sin = (rotation._angles(x)[:, 0].float() for x in (rotation.cos, rotation.sin))  # [B or 1, N, R/2]
            if frequencies.ndim != 1 or frequencies.shape[0] != cos.shape[-1]:
                continue
            made = _rotation(position_ids, frequencies, scale, layout)
            pairs = ((cos, made.cos.to(cos)), (sin, made.sin.to(sin)))
            if all(torch.allclose(x, y, atol=ROUNDED * scale, rtol=0) for x, y in pairs):
                last = torch.tensor([[limit - 1]], device=frequencies.device)
                return Reach(limit, _rotation(last, frequencies, scale, layout))
    return None


def _frequencies(module: nn.Module) -> Iterator[tuple[Tensor, float]]:
    """The frequencies [R/2] that a family's module keeps (one tensor for each type of layer), with their scale."""
    for name, buffer in module.named_buffers(recurse=False):
        prefix, found, _ = name.rpartition("inv_freq")
        kind = getattr(module, "rope_type", "default")
        kind = kind.get(prefix.rstrip("_"), "default") if isinstance(kind, dict) else kind
        # Angles of these depend on how long the text is.
        if found and not prefix.endswith("original_") and kind not in ("dynamic", "longrope"):
            yield buffer, float(getattr(module, f"{prefix}attention_scaling", 1.0))


def _rotation(position_ids: Tensor, frequencies: Tensor, scale: float, layout: Layout) -> Rotation:
    # In float64: positions of millions times frequencies of one leave nothing of float32's fractions.
    angles = position_ids.to(frequencies.device)[..., None].double() * frequencies.double()
    return Rotation((angles.cos() * scale).float(), (angles.sin() * scale).float(), layout)


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
