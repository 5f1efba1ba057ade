"""The heads of a layer that one of several devices has, as vLLM divides them (tensor parallelism).

Each device has as many query heads as the others, one after the other, and the key heads that these look at. Where
there are fewer key heads than devices, several devices have the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lolcats.errors import LolcatsError
from lolcats.mixers import Sizes
from lolcats.mixers.near_heads import read_split


class Shard(NamedTuple):
    """One of the devices."""

    rank: int = 0
    ranks: int = 1

    def sizes(self, whole: Sizes) -> Sizes:
        """Of what arrives at this device's part of a layer."""
        return whole._replace(heads=whole.heads // self.ranks, kv_heads=max(1, whole.kv_heads // self.ranks))

    def values(self, values: Mapping[str, Any], whole: Sizes) -> dict[str, Any]:
        """The settings of a layer (`LinearizationConfig.values`) for this part of it: sizes by key head are divided."""
        split = values.get("split")
        if split is None:
            return dict(values)
        part = self.sizes(whole).kv_heads
        begin = self.begin(whole.kv_heads, part)
        return dict(values) | {"split": read_split(split, whole.kv_heads)[begin : begin + part]}

    def take(self, whole: Tensor, shape: torch.Size) -> Tensor:
        """This device's part, of this shape, of a tensor that has something for each head in one of its dimensions."""
        for dim, (size, part) in enumerate(zip(whole.shape, shape, strict=True)):
            if size != part:
                whole = whole.narrow(dim, self.begin(size, part), part)
        return whole

    def begin(self, size: int, part: int) -> int:
        """Where this device's part of a dimension of this size begins."""
        return self.rank * (size // part) // self.ranks * part


def check_shards(ranks: int, whole: Sizes, settings: Mapping[str, Any]) -> None:
    """Raise LolcatsError where a layer with these settings cannot be divided over so many devices."""
    if ranks == 1:
        return
    few, many = sorted((whole.kv_heads, ranks))
    asked = f"a linearized model cannot be served with tensor_parallel_size {ranks}:"
    if whole.heads % ranks or many % few:
        raise LolcatsError(
            f"{asked} it has {whole.heads} query and {whole.kv_heads} key heads, which cannot be divided over as many"
        )
    kept = settings.get("kept") or {}
    score = kept.get("score") if kept.get("pairs") else None
    if score == "random":
        raise LolcatsError(f"{asked} its kept pairs are chosen by chance, which is another one on each device; use 1")
    reads_error = score == "self_recall" or kept.get("recall_error")
    if score and reads_error and whole.kv_heads < ranks and settings["state_heads"] == "query":
        raise LolcatsError(
            f"{asked} its kept pairs are chosen by what all {whole.heads // whole.kv_heads} query heads of a key head "
            f"recall, and these would be on several devices; use at most {whole.kv_heads}"
        )
