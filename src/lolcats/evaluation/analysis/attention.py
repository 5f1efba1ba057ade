"""Attention weights of teacher and student over a text, in cells: what is shown of them.

Texts of more tokens than there may be cells are pooled. Cell (a, b) is the weight that a query of part a gives to all
keys of part b together, mean over these queries; so what a query gives in all, its row, is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lolcats.errors import LolcatsError
from lolcats.evaluation.analysis.file import AttentionText, LayerAnalysis
from lolcats.evaluation.analysis.layers import block_of
from lolcats.evaluation.analysis.maps import Maps, map_bytes
from lolcats.evaluation.analysis.stream import LayerPass, Stream
from lolcats.mixers.softmax import attention_blocks


class Pooling(NamedTuple):
    """How N tokens lie in cells."""

    tokens: int
    cell: int
    """Tokens of a cell; the last one may have fewer."""

    @classmethod
    def of(cls, tokens: int, cells: int) -> Pooling:
        """In at most so many cells, and so in single tokens where there are no more."""
        return cls(tokens, -(-tokens // cells))

    @property
    def cells(self) -> int:
        """How many there are."""
        return -(-self.tokens // self.cell)

    def marks(self, device: torch.device) -> Tensor:
        """[N, cells], 1 where a token is in a cell, else 0."""
        cells = torch.arange(self.cells, device=device)
        place = torch.arange(self.tokens, device=device).div(self.cell, rounding_mode="floor")
        return (place[:, None] == cells).float()


def attention_maps(seen: LayerPass, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """The teacher's and the student's weights in cells, [H, cells, cells] float32 each.

    The teacher's are made for some queries after the other, the student's by what it gives for values that mark cells:
    neither has all queries and keys at once in memory.
    """
    marks = pooling.marks(seen.call.q.device)
    rows = (marks / marks.sum(0)).mT  # [cells, N], means over the queries of a cell
    parts = [
        weights[0] @ marks[: weights.shape[-1]] for _, weights in attention_blocks(seen.teacher, block_of(seen.teacher))
    ]
    given = seen.inside().total(marks.expand(*seen.call.k.shape[:2], -1, -1))[0]
    return rows @ torch.cat(parts, 1), rows @ given.float()


def choose_maps(layers: Sequence[LayerAnalysis], cells: Sequence[int], most: int) -> tuple[list[int], list[int]]:
    """Layers and heads whose maps have at most so many bytes: the worst layer, the best, the next worst, ...

    Where not all heads of one layer have room, as many as do.

    Args:
        layers: with their relative errors.
        cells: of the maps' sides, of each text.
        most: bytes of all maps.

    Raises:
        LolcatsError: there is no room for one.
    """
    one = sum(map(map_bytes, cells))
    ranked = sorted((layer for layer in layers if layer.heads), key=lambda layer: -(layer.relative_error or 0.0))
    heads = min(len(layer.heads) for layer in ranked)
    count = min(heads, most // one)
    if not count:
        raise LolcatsError(f"expected room for a map, {one:,} bytes; got {most:,}; allow more, or fewer tokens of it")
    order = [layer.layer for pair in zip(ranked, reversed(ranked), strict=True) for layer in pair]
    chosen = list(dict.fromkeys(order))[: max(1, most // (one * heads))]
    return sorted(chosen), [head * heads // count for head in range(count)]


def read_map(
    stream: Stream, ids: Tensor, pooling: Pooling, heads: Sequence[int], progress: Callable[[], object] | None = None
) -> Maps:
    """The maps of one text, tokens [N], by the layers of a stream; `progress` is called after each of them."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def visit(seen: LayerPass) -> None:
        teacher, student = (both[list(heads)].cpu() for both in attention_maps(seen, pooling))
        found[seen.layer] = teacher, student
        if progress is not None:
            progress()

    stream.read(ids, visit)
    sides = zip(*(found[index] for index in stream.indices), strict=True)
    return Maps(*(np.stack([part.numpy() for part in side]) for side in sides))


def text_in_cells(tokenizer: PreTrainedTokenizerBase, name: str, ids: Tensor, pooling: Pooling) -> AttentionText:
    """What is said of the text of a map, tokens [N]."""
    tokens = [str(tokenizer.decode(part.tolist())) for part in ids.split(pooling.cell)]
    return AttentionText(name=name, tokens=tokens, length=len(ids), cell=pooling.cell)
