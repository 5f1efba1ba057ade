"""Where a block's hidden states come from, and where those behind it go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from lolcats.errors import LolcatsError
from lolcats.models.block import Block
from lolcats.training.blocks.order import Order
from lolcats.training.blocks.store import HiddenStore

NAME = "hidden"
"""Of the tensor in a file."""
RECOMPUTED_BYTES = 2**30
"""Hidden states that are made together where none are stored: as many as the layers before are read for."""
PATIENCE = 2.0
"""Seconds of waiting for a batch between two looks whether anybody still makes it."""


class Source(Protocol):
    """The residual stream in front of a block."""

    def read(self, place: str) -> Tensor | None:
        """The stream [B, N, d_model] of a batch; None in front of the first block, which reads tokens."""
        ...


class Tokens:
    """The source of the first block."""

    def read(self, place: str) -> Tensor | None:
        """None: it reads tokens."""
        return None


class Stored:
    """What the block before has written.

    Args:
        store: of the boundary.
        order: of all batches.
        check: called while a batch is waited for; raises where nobody makes it.
    """

    def __init__(self, store: HiddenStore, order: Order, check: Callable[[], None]) -> None:
        self.store, self.check = store, check
        self._later = order.training

    def read(self, place: str) -> Tensor | None:
        """The stream of a batch, when it is there."""
        if self._later and place in self._later:
            self._fetch_ahead(place)
        while True:
            try:
                return self.store.read(place, wait=PATIENCE)[NAME]
            except LolcatsError:
                if (self.store.folder / f"{place}.safetensors").exists():  # whole or damaged: it has been read
                    raise
                self.check()

    def _fetch_ahead(self, place: str) -> None:
        """Have all that comes after the first batch that is asked for read in time."""
        following = self._later[self._later.index(place) + 1 :]
        self._later = []
        self.store.prefetch(following)


class Recomputed:
    """What the layers before give, which are read again for each gigabyte of it.

    Args:
        order: of all batches.
        load: of the blocks before, in order, each a function that reads it.
        precision: in which they compute.
    """

    def __init__(
        self, order: Order, load: list[Callable[[], Block]], precision: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self.order, self.load, self.precision = order, load, precision
        self._made: dict[str, dict[str, Tensor]] = {}
        """The last batches that were made of the training data, and of the validation data."""
        self._count = 1
        """Batches that are made together; the first says how large they are."""

    def read(self, place: str) -> Tensor | None:
        """The stream of a batch; of those behind it too, which are kept until they are asked for."""
        kind = place.split("-")[0]
        if place not in self._made.get(kind, {}):
            places = self.order.training if kind == "train" else self.order.validation
            begin = places.index(place)
            made = self._made[kind] = self._make(places[begin : begin + self._count])
            self._count = max(1, RECOMPUTED_BYTES // (made[place].numel() * made[place].element_size()))
        return self._made[kind][place]

    @torch.no_grad()
    def _make(self, places: list[str]) -> dict[str, Tensor]:
        streams: Mapping[str, Tensor | None] = dict.fromkeys(places)
        for load in self.load:
            block = load()
            streams = {place: self._run(block, place, stream) for place, stream in streams.items()}
            del block
        return {place: stream for place, stream in streams.items() if stream is not None}

    def _run(self, block: Block, place: str, stream: Tensor | None) -> Tensor:
        batch = self.order.batch(place)
        with self.precision():
            hidden = None if stream is None else stream.to(batch.input_ids.device)
            return block(batch.input_ids, batch.position_ids, hidden).cpu()


class Sink:
    """Where the stream behind a block goes.

    Args:
        store: of the boundary; None: nowhere.
        dtype: of what is stored; None is the stream's own.
        used: whether the block behind is finished, and needs nothing any more.
    """

    def __init__(
        self, store: HiddenStore | None, dtype: torch.dtype | None = None, used: Callable[[], bool] = lambda: False
    ) -> None:
        self.store, self.dtype, self.used = store, dtype, used

    def has(self, place: str) -> bool:
        """Whether a batch need not be written any more."""
        # In this order: a finished block says so before it deletes what it has read.
        return self.store is None or self.store.has(place) or self.used()

    def write(self, place: str, stream: Tensor) -> None:
        """Write the stream of a batch, unless it is there."""
        if self.store is not None and not self.has(place):
            self.store.write(place, {NAME: stream if self.dtype is None else stream.to(self.dtype)})
