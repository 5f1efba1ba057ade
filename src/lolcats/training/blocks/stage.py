"""Attention transfer of one block of layers.

The teacher's attention decides what goes on to the next layer, whatever the student has learned so far. So the stream
behind a block is what the next block is trained from: it is handed on while the block is trained, and no teacher runs
by itself. Only gradients that are clipped together make the result of blocks another one than that of all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from lolcats.config import TransferConfig
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
            hidden = hidden[:rows].to(ids.device)
            hidden = hidden if self.sink.dtype is None else hidden.to(self.block.model.dtype)
        stream = self.block(ids, batch.position_ids, hidden)
        if rows == self.order.rows(batch.place):
            self.sink.write(batch.place, stream)

    @torch.no_grad()
    def complete(self, precision: Callable[[], AbstractContextManager[object]]) -> None:
        """Hand on all batches that have not been: of a block that has nothing to learn, or was interrupted."""
        for place in self.order.places:
            if not self.sink.has(place):
                with precision():
                    self.take(self.order.batch(place))


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
