"""Which pairs a layer keeps of a text, for how long, and what other scores would have kept.

Key j of a key head with a window of w is kept at query i for j + w <= i < u_j, and is there at the end where u_j = N:

    stay = mean of u_j - (j + w) over the keys that were kept at all
    overlap with a score = |E and F| / |F|, E and F the keys kept at the end by the layer and by that score

"oracle" scores a key by the attention that later queries do give it, "recency" by its position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lolcats.evaluation.analysis.file import KeptAnalysis
from lolcats.evaluation.analysis.stream import LayerPass
from lolcats.mixers.inside import Chosen, NearSize


class _Times(NamedTuple):
    """Of the keys of one key head."""

    begin: Tensor
    """[N], the query at which each key has left the window."""
    end: Tensor
    """[N], that from which on it is not kept; not after `begin` where it never was."""
    score: Tensor
    """[N]."""
    left: Tensor
    """[N], whether it could be kept by the end: it has left, and is no sink."""

    @classmethod
    def of(cls, chosen: Chosen, size: NearSize, head: int) -> _Times:
        until, score = chosen.until[0, head], chosen.score[0, head]
        keys = torch.arange(len(until), device=until.device)
        begin = keys + size.window
        return cls(begin, until, score, (keys >= size.sinks) & (begin < len(until)))

    @property
    def at_end(self) -> Tensor:
        """[N], whether a key is kept after the last token."""
        return self.left & (self.end >= len(self.end))

    def stay(self) -> float | None:
        """Mean number of queries for which a key stayed that was kept."""
        stayed = (self.end - self.begin)[self.left & (self.end > self.begin)]
        return float(stayed.double().mean()) if len(stayed) else None


def overlap(one: Tensor, other: Tensor) -> float | None:
    """Share of what `other` marks that `one` marks too; None where it marks nothing."""
    return int((one & other).sum()) / int(other.sum()) if bool(other.any()) else None


def kept_pairs(seen: LayerPass, tokens: list[str]) -> list[KeptAnalysis]:
    """What each key head of a layer keeps of a text; heads that keep no pairs are left out.

    Args:
        seen: the layer at one text.
        tokens: the text of each token.
    """
    inside = seen.inside()
    if inside.keep is None:
        return []
    own, oracle, recency = (inside.keep(name) for name in (None, "oracle", "recency"))
    found = []
    for head, size in enumerate(inside.sizes):
        if not size.pairs:
            continue
        times = _Times.of(own, size, head)
        kept = times.at_end
        positions = kept.nonzero()[:, 0].tolist()
        found.append(
            KeptAnalysis(
                layer=seen.layer,
                key_head=head,
                positions=positions,
                tokens=[tokens[position] for position in positions],
                scores=[float(score) for score in times.score[kept]],
                candidates=int(times.left.sum()),
                stay_mean=times.stay(),
                overlap_oracle=overlap(kept, _Times.of(oracle, size, head).at_end),
                overlap_recency=overlap(kept, _Times.of(recency, size, head).at_end),
            )
        )
    return found


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[str]:
    """The text of each of the tokens [N]."""
    return [str(tokenizer.decode([token])) for token in ids.tolist()]
