"""Near attention over many tokens for all key heads of a layer at once, where their windows and kept pairs differ.

One size after the other it is some 130 small operations for each, which a GPU waits for. Here every key head has as
many slots as the largest: of a ring the first w_h are used, and of the kept pairs the first P - P_h are *surplus*:
their score is infinite, so they are kept for good, which leaves P_h places, and no query sees them.

Numbers of keys are those of `blocks`: from 0, the ring of the state in order (w_h keys), then the N new tokens.

Legend: B texts, H query heads, KV key heads, N tokens, D key size, Dv value size; of key head h: window w_h and P_h
kept pairs; W and P the most that a key head has, P at least 1; s sinks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lolcats.ops.hybrid.layout import take_tokens
from lolcats.ops.near.blocks import BLOCK, Kernels
from lolcats.ops.near.head_sizes import HeadSizes, head_sizes, split_slots
from lolcats.ops.near.quantize import PairCodec, plain_map
from lolcats.ops.near.selection import EMPTY, Selection, select_pairs
from lolcats.ops.near.types import Coded, KeptPairs, NearRing, NearSpec, NearState
from lolcats.ops.types import SinkKeys, accumulation_dtype

T = TypeVar("T")
SURPLUS = torch.inf
"""Score of a slot that a key head does not have."""
Parts = tuple[tuple[NearSpec, tuple[int, ...]], ...]
"""Key heads of the same sizes: what near attention is told, and their numbers in the layer."""


@torch.no_grad()
def near_of_several(
    q: Tensor,
    parts: Parts,
    coded: Coded,
    kernels: Kernels,
    *,
    score: Tensor,
    states: Sequence[NearState] | None,
    lengths: Tensor | None = None,
    sink_logits: Tensor | None = None,
    sink_q: Tensor | None = None,
    return_state: bool = False,
    codec: PairCodec | None = None,
) -> tuple[Tensor, list[NearState] | None]:
    """`near_attention` of key heads whose sizes differ, by kernels and without gradients.

    Args:
        coded: keys and values of all key heads as attention sees them and, with `return_state`, as the state has them.
        kernels: of the attention.
        score: [B, KV, N].
        states: of each part, after earlier tokens, or None.
        q, parts, lengths, sink_logits, sink_q, return_state, codec: as in `near_attentions`, whose result this is.
    """
    sizes = head_sizes(tuple((spec.window, spec.pairs, heads) for spec, heads in parts), q.device)
    told = parts[0][0]._replace(window=sizes.most_window, pairs=sizes.most_pairs)
    score = score.to(accumulation_dtype(coded.k, coded.v))
    held = _fresh(told, sizes, coded, score, codec) if states is None else _joined(states, sizes, score).in_order()
    n = score.shape[2]
    real = torch.full_like(held.length, n) if lengths is None else lengths
    call = _Call(sizes, told, n, held, held.length[:, None, None], real[:, None, None])
    rows, leaving = _marks(call, score)
    chosen = select_pairs(_some(held.kept).score, leaving, BLOCK, sizes.surplus)
    chosen = _within_reach(chosen, call, states is None)
    seen = None if states is None else held if codec is None else codec.decode_state(held, coded.k.dtype)
    sink_q = sink_q if told.sinks else None
    out = kernels(q, coded.k, coded.v, told, chosen, lengths, sink_logits, seen, sink_q, sizes.told)
    if not return_state:
        return out, None
    new = (coded.k, coded.v) if codec is None else coded[2:]
    return out, _final_states(call, parts, new, rows, leaving, chosen)


class _Call(NamedTuple):
    """What a call is made of."""

    sizes: HeadSizes
    spec: NearSpec
    """Of a key head with the most of everything."""
    tokens: int
    """N."""
    held: NearState
    """What came before, of W slots and P kept pairs for each key head, the surplus first."""
    start: Tensor
    """[B, 1, 1] int64: tokens before these."""
    real: Tensor
    """[B, 1, 1] int64: real tokens among these."""

    def row(self, number: Tensor, window: Tensor) -> Tensor:
        """Where keys of these numbers [B, ...] lie in a ring of W slots and the new tokens after it."""
        start = self.start.view(-1, *(1,) * (number.ndim - 1))
        return torch.where(number < window, (start + number) % window, number + (self.sizes.most_window - window))


def _marks(call: _Call, score: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B, KV, W + N] of ring and new tokens, and [B, KV, N] of the key that leaves with each query.

    The latter are `EMPTY` where it is a sink, or the query is padding.
    """
    rows = torch.cat([_some(call.held.ring.score), score], 2)
    number = torch.arange(call.tokens, device=score.device).expand(score.shape)
    leaves = (call.start + number - call.sizes.window >= call.spec.sinks) & (number < call.real)
    return rows, torch.where(leaves, rows.gather(2, call.row(number, call.sizes.window)), EMPTY)


def _within_reach(chosen: Selection, call: _Call, fresh: bool) -> Selection:
    """The selection with pairs seen no longer than `spec.reach` allows."""
    reach, until = call.spec.reach, chosen.until
    if reach is None or (fresh and call.tokens <= reach):
        return chosen
    last = torch.arange(call.tokens, device=until.device) - call.sizes.window + reach
    before = _some(call.held.kept).position - call.start + reach
    last = torch.cat([before.to(until.dtype), last.to(until.dtype).expand(before.shape[0], -1, -1)], -1)
    return chosen._replace(until=torch.minimum(until, last).clamp_min(0))


def _final_states(
    call: _Call, parts: Parts, new: Sequence[Tensor | None], rows: Tensor, leaving: Tensor, chosen: Selection
) -> list[NearState]:
    """The state of each part after the last real token of each text."""
    window, pairs, held, n = call.sizes.most_window, call.sizes.most_pairs, call.held, call.tokens
    kept, length = _some(held.kept), (call.start + call.real)[:, 0]
    head, slot, own = call.sizes.ring
    ring = call.row(call.real[:, 0] + (slot - length) % own, own)
    of_kept, slot, own = call.sizes.kept
    after = _of_slots(chosen.after.long(), of_kept, slot.expand(length.shape[0], -1))
    source = torch.where(after < pairs, after + (window + n), call.row(after - pairs, own))
    both, at = torch.cat([head, of_kept]), torch.cat([ring, source], 1)
    pair_k, pair_v = (
        _of_slots(torch.cat([before, _some(x), behind], 2), both, at).split([ring.shape[1], after.shape[1]], 1)
        for before, x, behind in zip(held.ring[:2], new, kept[:2], strict=True)
    )
    came = call.start + torch.arange(n, device=rows.device) - call.sizes.window
    position = torch.cat([kept.position, came.int().expand(*kept.position.shape[:2], -1)], 2)
    score = torch.cat([kept.score, leaving], 2)
    rings = pair_k[0], pair_v[0], _of_slots(rows, head, ring)
    pairs_of = pair_k[1], pair_v[1], _of_slots(score, of_kept, after), _of_slots(position, of_kept, after)
    sinks = _sinks(call, new)
    return _split(parts, rings, pairs_of, sinks and SinkKeys(*(x.index_select(1, call.sizes.order) for x in sinks)),
                  length[:, 0])  # fmt: skip


def _of_slots(x: Tensor, head: Tensor, index: Tensor) -> Tensor:
    """x [B, KV, m, ...] at index [B, S] of each slot's key head [S]: [B, S, ...]."""
    at = index + head * x.shape[2]
    x = x.flatten(1, 2)
    return x.gather(1, at if x.ndim == 2 else at[..., None].expand(-1, -1, x.shape[2]))


def _sinks(call: _Call, new: Sequence[Tensor | None]) -> SinkKeys | None:
    """The first tokens of each text, those of before or new ones."""
    if call.held.sinks is None:
        return None
    wanted = torch.arange(call.spec.sinks, device=call.start.device) - call.start[:, 0]
    is_new, index = (wanted >= 0) & (wanted < call.tokens), wanted.clamp(0, call.tokens - 1)
    both = zip(call.held.sinks, new, strict=True)
    return SinkKeys(*(torch.where(is_new[:, None, :, None], take_tokens(_some(x), index), old) for old, x in both))


def _fresh(spec: NearSpec, sizes: HeadSizes, coded: Coded, score: Tensor, codec: PairCodec | None) -> NearState:
    """The state before any token. Its tensors are views of a few numbers, to be read alone."""
    rows = score.shape[:2]
    sizes_of = coded.k.shape[3], coded.v.shape[3]
    k, v = (coded.k.new_zeros(1, 1, 1, size) for size in sizes_of)
    if codec is not None:
        k, v = _empty_pair(codec.bits, *sizes_of, score.device)

    def pairs(count: int) -> tuple[Tensor, Tensor]:
        return k.expand(*rows, count, -1), v.expand(*rows, count, -1)

    slots = torch.arange(spec.pairs, device=score.device)
    marks = torch.where(slots < sizes.surplus, SURPLUS, EMPTY).to(score.dtype).expand(*rows, -1)
    places = slots.new_zeros(1, dtype=torch.int32).expand(*rows, spec.pairs)
    sinks = SinkKeys(*pairs(spec.sinks)) if spec.sinks else None
    ring = NearRing(*pairs(spec.window), score.new_zeros(1).expand(*rows, spec.window))
    return NearState(ring, sinks, KeptPairs(*pairs(spec.pairs), marks, places), slots.new_zeros(rows[0]))


@functools.lru_cache(maxsize=256)
def _empty_pair(bits: int, size: int, value_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bytes [1, 1, 1, .] of a key and a value of zeros, which no map of keys changes; each layer begins with them."""
    with torch.inference_mode(False):
        k, v = (torch.zeros(1, 1, 1, x, device=device) for x in (size, value_size))
        return PairCodec(bits, plain_map(1, size, device)).encode(k, v)


def _joined(states: Sequence[NearState], sizes: HeadSizes, like: Tensor) -> NearState:
    """The states of the parts in one, of W slots and P kept pairs for each key head; scores are made `like` these."""
    window, pairs, order = sizes.most_window, sizes.most_pairs, sizes.place
    rings = [s.ring._replace(score=like.new_zeros(s.ring.k.shape[:3]) if s.ring.score is None else s.ring.score)
             for s in states]  # fmt: skip
    kept = [_none_kept(ring) if s.kept is None else s.kept for s, ring in zip(states, rings, strict=True)]

    def join(tensors: Sequence[Tensor | None]) -> Tensor:
        return torch.cat([_some(x) for x in tensors], 1).index_select(1, order)

    sinks = [s.sinks for s in states if s.sinks is not None]
    return NearState(
        NearRing(*(join([_padded(_some(x), 0, window) for x in of]) for of in zip(*rings, strict=True))),
        SinkKeys(*(join(of) for of in zip(*sinks, strict=True))) if sinks else None,
        KeptPairs(*(join([_padded(x, pairs, 0, fill) for x in of])
                    for of, fill in zip(zip(*kept, strict=True), (0, 0, SURPLUS, -1), strict=True))),
        states[0].length,
    )  # fmt: skip


def _none_kept(ring: NearRing) -> KeptPairs:
    """No pairs, as beside this ring."""
    k, v, score = (_some(x)[:, :, :0] for x in ring)
    return KeptPairs(k, v, score, score.int())


def _padded(x: Tensor, before: int, behind: int, fill: float = 0.0) -> Tensor:
    """x [B, KV, slots, ...] with as many slots as `before` or `behind`, those that it has being at the other end."""
    more = [max(0, most - x.shape[2]) for most in (before, behind)]
    return nnf.pad(x, (*(0, 0) * (x.ndim - 3), *more), value=fill) if any(more) else x


def _split(
    parts: Parts, ring: Sequence[Tensor], kept: Sequence[Tensor], sinks: SinkKeys | None, length: Tensor
) -> list[NearState]:
    """The state of each part, from what slots [B, S, ...] and sinks [B, KV, s, .] hold, part after part."""
    count, window, pairs = zip(*((len(heads), spec.window, spec.pairs) for spec, heads in parts), strict=True)

    rings = zip(*(split_slots(x, count, window) for x in ring), strict=True)
    pairs_of = zip(*(split_slots(x, count, pairs) for x in kept), strict=True)
    of_sinks: list[SinkKeys | None] = [None] * len(parts)
    if sinks is not None:
        of_sinks = [
            SinkKeys(*(x.contiguous() for x in both)) for both in zip(*(x.split(count, 1) for x in sinks), strict=True)
        ]
    return [
        NearState(NearRing(k, v, score if most else None), held, KeptPairs(*own) if most else None, length.clone())
        for (k, v, score), own, held, most in zip(rings, pairs_of, of_sinks, pairs, strict=True)
    ]


def _some(x: T | None) -> T:
    """x, which is there in states of W slots and P kept pairs."""
    assert x is not None
    return x
