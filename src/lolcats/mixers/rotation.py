"""Rotary embedding as a fact about q and k, so that it can be undone.

A rotary embedding turns pairs of channels by angles that depend on the position. Families differ in which channels make
a pair, in how much of a head is turned, and in the form in which they pass cosines and sines on: `Layout` says which.
"""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """How a family rotates."""

    pairs: Literal["half", "interleaved", "none"]
    """"half": channel i with i + R/2 (Llama); "interleaved": 2i with 2i + 1 (GPT-J, Cohere); "none": no rotation."""
    place: Literal["first", "last"] = "first"
    """Which R of the D channels are rotated; the rest passes unchanged."""
    angles: Literal["cat", "repeat", "single"] = "cat"
    """How [.., P] cosines stand for the R/2 pairs: as [f, f], as [f0, f0, f1, f1, ..], or once each."""


def layouts(angles: int, head_dim: int) -> list[Layout]:
    """All layouts that differ for heads of D = `head_dim` channels and P = `angles` cosines handed over."""
    found = {}
    for layout in LAYOUTS:
        half = angles if layout.angles == "single" else angles // 2
        if layout.pairs == "none":
            found[layout] = layout
        elif 0 < 2 * half <= head_dim and (layout.angles == "single" or angles % 2 == 0):
            same = layout if half > 1 else Layout("half", layout.place, "single" if angles == 1 else "cat")
            same = same if 2 * half < head_dim else same._replace(place="first")
            found[same] = same
    return list(found)


LAYOUTS = (
    Layout("none"),
    *(
        Layout(*kind)
        for kind in itertools.product(("half", "interleaved"), ("first", "last"), ("cat", "repeat", "single"))
    ),
)
"""All that are known."""


class Rotation(NamedTuple):
    """The rotation of the tokens of a call."""

    cos: Tensor
    """[B or 1, N, P], as the family made it."""
    sin: Tensor
    layout: Layout

    def to(self, device: torch.device) -> Rotation:
        """The same on another device."""
        return self._replace(cos=self.cos.to(device), sin=self.sin.to(device))

    def undo(self, x: Tensor) -> Tensor:
        """x before the rotation: [B, h, N, D], in its own dtype; computed in float32 (float64 for float64)."""
        return self._turn(x, back=True)

    def apply(self, x: Tensor) -> Tensor:
        """x after the rotation: [B, h, N, D]."""
        return self._turn(x, back=False)

    def partners(self, channels: Tensor) -> Tensor:
        """Of each of all channels, [D], the one that makes a pair with it; itself where it is not rotated."""
        if self.layout.pairs == "none":
            return channels
        width = self.cos.shape[-1] * (2 if self.layout.angles == "single" else 1)
        rest = channels.shape[0] - width
        first = self.layout.place == "first"
        turned, kept = (channels[:width], channels[width:]) if first else (channels[rest:], channels[:rest])
        one, two = self._split(turned)
        turned = self._join(two, one)
        return torch.cat([turned, kept] if first else [kept, turned])

    def _angles(self, x: Tensor) -> Tensor:
        """One number a pair: [B or 1, 1, N, R/2]."""
        half = x.shape[-1] // 2
        parts = {"cat": x[..., :half], "repeat": x[..., ::2], "single": x}
        return parts[self.layout.angles][:, None]

    def _turn(self, x: Tensor, back: bool) -> Tensor:
        if self.layout.pairs == "none":
            return x
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = (self._angles(t).to(dtype) for t in (self.cos, self.sin))
        if back:  # some families scale while they rotate: the inverse divides by the scale
            size = cos.square() + sin.square()
            cos, sin = cos / size, -sin / size
        width = 2 * cos.shape[-1]
        rest = x.shape[-1] - width
        turned, kept = (
            (x[..., :width], x[..., width:]) if self.layout.place == "first" else (x[..., rest:], x[..., :rest])
        )
        one, two = self._split(turned.to(dtype))
        turned = self._join(one * cos - two * sin, two * cos + one * sin).to(x.dtype)
        return torch.cat([turned, kept] if self.layout.place == "first" else [kept, turned], -1)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.layout.pairs == "half":
            one, two = x.chunk(2, -1)
            return one, two
        return x[..., ::2], x[..., 1::2]

    def _join(self, one: Tensor, two: Tensor) -> Tensor:
        if self.layout.pairs == "half":
            return torch.cat([one, two], -1)
        return torch.stack([one, two], -1).flatten(-2)


class Reach(NamedTuple):
    """How far a model was made to look back."""

    tokens: int
    """Of its context: the last position that it knows is one less."""
    rotation: Rotation
    """At this last position: cos and sin [1, 1, P]."""

    def capped(self, q: Tensor, rotation: Rotation) -> Tensor:
        """Queries q [B, H, N, D], rotated by `rotation`, as they would be at the last position of the context."""
        return self.rotation.to(q.device).apply(rotation.undo(q))
