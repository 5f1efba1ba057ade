"""Where the states of a request lie in memory that an engine hands out as pages of bytes.

An engine knows pages, one for each request. A page has the states of one or more layers, tensor after tensor, each at a
multiple of `ALIGNMENT`. So the engine copies and counts bytes, whatever tensors a mixer's state is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lolcats.mixers import Mixer, StateSpec, map_state, state_tensors

ALIGNMENT = 16
"""Bytes: what the widest loads of kernels want."""


class PageLayout(NamedTuple):
    """Bytes of a page."""

    offsets: tuple[tuple[int, ...], ...]
    """Of each layer's state, where each of its tensors begins."""
    nbytes: int
    """All of them together."""

    @classmethod
    def of(cls, specs: Sequence[StateSpec]) -> PageLayout:
        """The states of these layers, one after the other."""
        offsets, end = [], 0
        for spec in specs:
            own = []
            for size in spec.sizes:
                own.append(end)
                end += -(-size // ALIGNMENT) * ALIGNMENT
            offsets.append(tuple(own))
        return cls(tuple(offsets), end)


def pool_in_pages(pages: Tensor, offsets: Sequence[int], form: Any) -> Any:
    """The states of all pages as a pool, which is a view of them.

    Args:
        pages: [P, bytes] uint8; rows may lie further apart than they are long.
        offsets: of the tensors of one layer, see `PageLayout`.
        form: a state of the layer, of any number of texts.

    Returns:
        A state like `form` of P texts.
    """
    places = iter(offsets)

    def view(tensor: Tensor) -> Tensor:
        shape, begin = tensor.shape[1:], next(places)
        part = pages[:, begin : begin + shape.numel() * tensor.element_size()].view(tensor.dtype)
        return part.unflatten(1, shape) if shape else part[:, 0]

    return map_state(form, view)


def empty_page(mixers: Sequence[Mixer], dtype: torch.dtype, layout: PageLayout) -> Tensor:
    """The page [bytes] uint8 of a request of which no token was seen yet."""
    page = torch.zeros(1, layout.nbytes, dtype=torch.uint8)
    for mixer, offsets in zip(mixers, layout.offsets, strict=True):
        state = mixer.empty_state(1, dtype)
        for held, new in zip(state_tensors(pool_in_pages(page, offsets, state)), state_tensors(state), strict=True):
            held.copy_(new)
    return page[0]
