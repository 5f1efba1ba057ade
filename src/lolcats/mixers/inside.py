"""What a layer does with a text, for those who look into it: weights, shares, decays, and which pairs it keeps.

The weights are the layer's own: what it gives for values of 1 at some keys and 0 at all others. So there is no second
definition of them, and no matrix of all queries and keys unless somebody asks for values that are all of it.

Legend: B texts, H query heads, KV key heads, N tokens, C channels of values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lolcats.mixers.base import Call
from lolcats.mixers.near_heads import HeadGroup, kept_until_of, near_half, windows_of
from lolcats.mixers.scores import KeyScores
from lolcats.mixers.sinks import capped_queries, sink_queries
from lolcats.ops.near.quantize import PairCodec
from lolcats.ops.types import accumulation_dtype

Sums = Callable[[Tensor], Tensor]
"""What a layer, or half of it, gives for values [B, KV, N, C]: [B, H, N, C]."""

Sees = Callable[[Tensor, Tensor], Tensor]
"""Whether keys [1, K] that are not later than queries [Q, 1] are in their window or sinks: [KV or 1, Q, K]."""


class Chosen(NamedTuple):
    """Which pairs a score keeps."""

    score: Tensor
    """[B, KV, N], of each key."""
    until: Tensor
    """[B, KV, N] int64: key j is kept at query i for j + window <= i < until[j], and at the end where it is N."""


class NearSize(NamedTuple):
    """What a key head sees exactly, in tokens."""

    window: int
    sinks: int
    pairs: int
    """Kept pairs at most."""


class Inside(NamedTuple):
    """A layer over whole texts, one in each row."""

    sizes: tuple[NearSize, ...]
    """Of each key head."""
    near: Sums
    """Without the far half's part; of a layer whose halves have one denominator, all of it."""
    far: Sums | None
    """The far half's part, which is added to the near one; None where there is none, or it is in `near`."""
    share: Tensor | None
    """[B, H, N], the far half's share; None where there is no far half, or it has no share of its own."""
    decay: Tensor | None
    """[B, H, N], what a token leaves of the far half's state, or None."""
    window_factor: Tensor | None
    """[H], by which exponentials of the window are multiplied (`hybrid`), or None."""
    sees: Sees
    """The keys that `near` sees exactly, but for kept pairs."""
    keep: Callable[[str | None], Chosen] | None
    """The pairs that the layer keeps, or would by the score of another name; None where it keeps none."""

    @property
    def one_denominator(self) -> bool:
        """Whether `near` is both halves: what it gives to keys that `sees` leaves out is the far half's then."""
        return self.window_factor is not None

    def total(self, values: Tensor) -> Tensor:
        """What the layer gives for values [B, KV, N, C] of its own dtype: [B, H, N, C]."""
        near = self.near(values)
        return near if self.far is None else near + self.far(values)

    def joined(self, far: Sums, share: Tensor, decay: Tensor | None) -> Inside:
        """This near half with a far one.

        Args:
            far: by itself.
            share: [B, H, N], the logit of its share.
            decay: [B, H, N] or None.
        """
        part, near = share.sigmoid(), self.near
        rest, of_far = (1 - part)[..., None], part[..., None]
        return self._replace(
            near=lambda values: rest * near(values), far=lambda values: of_far * far(values), share=part, decay=decay
        )


def near_inside(groups: tuple[HeadGroup, ...], call: Call, score: Tensor | None, codec: PairCodec | None) -> Inside:
    """Near attention alone, on keys as they are stored; in float32, or float64 where the call is.

    Args:
        groups, call: of the layer.
        score: [B, KV, N], where pairs are kept.
        codec: of stored keys, or None.
    """
    dtype, windows, sinks = accumulation_dtype(call.q, call.v), windows_of(groups), groups[0].spec.sinks
    sink_q = sink_queries(call, None, None, capped_queries(call, None, sinks))
    sink_q = None if sink_q is None else sink_q.to(dtype)
    k = call.k if codec is None else codec.coded(call.k, call.v, False).k
    plain = replace(call, q=call.q.to(dtype), k=k.to(dtype))

    def near(values: Tensor) -> Tensor:
        return near_half(
            groups, replace(plain, v=values.to(dtype)), None, score=score, lengths=None, keep=False, slots=None,
            codec=None, impl="chunked", sink_q=sink_q,
        )[0]  # fmt: skip

    def sees(query: Tensor, key: Tensor) -> Tensor:
        window = torch.as_tensor(windows, device=query.device).view(-1, 1, 1)
        return (key < sinks) | (query - key < window)

    by_head = {head: NearSize(group.spec.window, sinks, group.spec.pairs) for group in groups for head in group.heads}
    sizes = tuple(by_head[head] for head in range(len(by_head)))
    return Inside(sizes, near, None, None, None, None, sees, None)


def keeper(
    groups: tuple[HeadGroup, ...], call: Call, k: Tensor, own: KeyScores, recall: Callable[[], Tensor]
) -> Callable[[str | None], Chosen]:
    """`Inside.keep` of a layer with the score `own`; other scores mix and fade as it does.

    Args:
        groups, call: of the layer.
        k: [B, KV, N, D], keys as the score reads them.
        recall: makes the error of the far half, as for `KeyScores`.
    """
    position = torch.arange(k.shape[2], device=k.device).expand(len(k), -1)

    def keep(name: str | None) -> Chosen:
        score = own if name is None else KeyScores(own.sizes, name, own.mix, own.fade, recall_error=False)
        marks = score(call, k, position, windows_of(groups), recall)
        return Chosen(marks, kept_until_of(groups, call, marks, None))

    return keep
