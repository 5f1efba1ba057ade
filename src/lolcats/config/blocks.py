"""The settings `transfer.blocks`: attention transfer block by block."""

from __future__ import annotations

from typing import Literal

from lolcats.config.fields import Positive, Section


class BlocksConfig(Section):
    """Stage 1 of models that do not fit: blocks of decoder layers, each trained by itself (docs/guide.md)."""

    size: Positive | None = None  # layers of a block, a divisor of the model's; null trains all layers together
    # What a block is trained from: store keeps what the block before it hands on, on the disk; recompute runs the
    # layers before it again, as often as their hidden states do not fit in a gigabyte.
    hidden: Literal["store", "recompute"] = "store"
    keep: bool = False  # leave stored hidden states where they are when they have been used
    # Of stored hidden states; null is the model's own, in which nothing is rounded.
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    folder: str | None = None  # of stored hidden states; null is in the run's folder
