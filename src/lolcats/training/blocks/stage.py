"""Attention transfer of one block of layers.

The teacher's attention decides what goes on to the next layer, whatever the student has learned so far. So the stream
behind a block is what the next block is trained from: it is handed on while the block is trained, and no teacher runs
by itself. Only gradients that are clipped together make the result of blocks another one than that of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from lolcats.config import TransferConfig
from lolcats.modeling import linearized_layers
from lolcats.models.block import Block
from lolcats.training.batches import Batch
from lolcats.training.blocks.hidden import Sink, Source
from lolcats.training.blocks.order import Order
from lolcats.training.transfer import TransferStage


class Passage:
    """One block between two boundaries.

    Args:
        block: its layers.
        order: of all batches.
        source: of the stream in front of it.
        sink: of that behind it.
    """

    def __init__(self, block: Block, order: Order, source: Source, sink: Sink) -> None:
        self.block, self.order, self.source, self.sink = block, order, source, sink

    def take(self, batch: Batch) -> None:
        """Run the block on a batch, or on its first sequences, which are not handed on."""
        ids, rows = batch.input_ids, batch.input_ids.shape[0]
        hidden = self.source.read(batch.place)
        if hidden is not None:
            hidden = hidden[:rows].to(ids.device, non_blocking=True)
            hidden = hidden if self.sink.dtype is None else hidden.to(self.block.model.dtype)
        stream = self.block(ids, batch.position_ids, hidden)
        if rows == self.order.rows(batch.place):
            self.sink.write(batch.place, stream)

    @torch.no_grad()
    def complete(self, precision: Callable[[], AbstractContextManager[object]]) -> None:
        """Hand on all batches that have not been: of a block that has nothing to learn, or was interrupted."""
        with _teaching(self.block):
            for place in self.order.places:
                if not self.sink.has(place):
                    with precision():
                        self.take(self.order.batch(place))


@contextmanager
def _teaching(block: Block) -> Iterator[None]:
    """Inside, the teacher's attention decides what a block hands on, as it does while it is trained."""
    layers = linearized_layers(block.model)
    for layer in layers:
        layer.observer = _learn_nothing
    try:
        yield
    finally:
        for layer in layers:
            layer.observer = None


def _learn_nothing(*_: object) -> None:
    pass


class BlockStage(TransferStage):
    """Stage 1 of one block, for `train`.

    Args:
        passage: the block, in a model whose layers are linearized.
        config: the stage's settings.
    """

    def __init__(self, passage: Passage, config: TransferConfig) -> None:
        super().__init__(passage.block.model, config)
        self.passage = passage

    def _read(self, batch: Batch) -> None:
        self.passage.take(batch)
