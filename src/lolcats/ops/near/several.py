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

from lolcats.ops.near.blocks import BLOCK, Kernels
from lolcats.ops.near.head_sizes import SURPLUS, Ends, HeadSizes, Slots, head_sizes, split_slots
from lolcats.ops.near.quantize import PairCodec, plain_map
from lolcats.ops.near.selection import Selection, select_pairs
from lolcats.ops.near.types import Coded, KeptPairs, NearRing, NearSpec, NearState
from lolcats.ops.types import SinkKeys, accumulation_dtype

T = TypeVar("T")
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
    # Not at the top: Triton is a requirement neither of this package nor of the code that `lolcats export` writes.
    from lolcats.ops.near.kernels.collect import collect_slots, leaving_scores

    sizes = head_sizes(tuple((spec.window, spec.pairs, heads) for spec, heads in parts), q.device)
    told = parts[0][0]._replace(window=sizes.most_window, pairs=sizes.most_pairs)
    score = score.to(accumulation_dtype(coded.k, coded.v)).contiguous()
    held = _fresh(sizes, coded, codec) if states is None else _joined(states, sizes, score).in_order()
    start = held.length.expand(len(score)).contiguous()
    n, tokens = len(parts), score.shape[2]  # each part has lengths of its own, to which a step may write
    real = start.new_full((n, len(start)), tokens) if lengths is None else lengths.expand(n, -1)
    ends = Ends(start, real[0], states is None)
    leaving = leaving_scores(score, _some(held.ring.score), sizes, ends, told.sinks)
    chosen = select_pairs(_some(held.kept).score.expand(len(score), -1, -1), leaving, BLOCK, sizes.surplus)
    chosen = _within_reach(chosen, told, sizes, held, ends)
    seen = None if states is None else held if codec is None else codec.decode_state(held, coded.k.dtype)
    sink_q = sink_q if told.sinks else None
    out = kernels(q, coded.k, coded.v, told, chosen, lengths, sink_logits, seen, sink_q, sizes.told)
    if not return_state:
        return out, None
    new = [_some(x) for x in ((coded.k, coded.v) if codec is None else coded[2:])]
    slots = collect_slots(new, held, score, leaving, chosen.after, sizes, ends, told.sinks)
    return out, _split(parts, slots, real.contiguous() if ends.is_fresh else start + real)


def _within_reach(chosen: Selection, spec: NearSpec, sizes: HeadSizes, held: NearState, ends: Ends) -> Selection:
    """The selection with pairs seen no longer than `spec.reach` allows."""
    reach, until = spec.reach, chosen.until
    tokens = until.shape[2] - sizes.most_pairs
    if reach is None or (ends.is_fresh and tokens <= reach):
        return chosen
    last = torch.arange(tokens, device=until.device) - sizes.window + reach
    before = _some(held.kept).position - ends.start[:, None, None] + reach
    before = before.to(until.dtype).expand(*until.shape[:2], sizes.most_pairs)
    last = torch.cat([before, last.to(until.dtype).expand(len(until), -1, -1)], -1)
    return chosen._replace(until=torch.minimum(until, last).clamp_min(0))


def _fresh(sizes: HeadSizes, coded: Coded, codec: PairCodec | None) -> NearState:
    """The state before any token: one slot of one key head stands for all, but of the kept scores; to be read alone."""
    bits, form = None if codec is None else codec.bits, (coded.k.shape[3], coded.v.shape[3], coded.k.dtype)
    k, v, score, position, length = _empty_slot(bits, *form, coded.k.device)
    return NearState(NearRing(k, v, score), SinkKeys(k, v), KeptPairs(k, v, sizes.marks[None], position), length)


class _EmptySlot(NamedTuple):
    """A pair of zeros [1, 1, 1, .] as a state has it, its score and position [1, 1, 1], and the length [1]."""

    k: Tensor
    v: Tensor
    score: Tensor
    position: Tensor
    length: Tensor


@functools.lru_cache(maxsize=256)
def _empty_slot(bits: int | None, size: int, value_size: int, dtype: torch.dtype, device: torch.device) -> _EmptySlot:
    """Of pairs of `dtype` or, with `bits`, of bytes, which no map of keys changes; each layer begins with it."""
    with torch.inference_mode(False):
        k, v = (torch.zeros(1, 1, 1, x, dtype=dtype, device=device) for x in (size, value_size))
        if bits is not None:
            k, v = PairCodec(bits, plain_map(1, size, device)).encode(k, v)
        score, position = (torch.zeros(1, 1, 1, dtype=x, device=device) for x in (torch.float32, torch.int32))
        return _EmptySlot(k, v, score, position, torch.zeros(1, dtype=torch.int64, device=device))


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


def _split(parts: Parts, slots: Slots, length: Tensor) -> list[NearState]:
    """The state of each part, of which there are n; `length` is [n, B]."""
    n = len(parts)
    rings = [(len(heads), spec.window) for spec, heads in parts]
    kept = [(len(heads), spec.pairs) for spec, heads in parts]
    sinks = [(len(heads), spec.sinks) for spec, heads in parts]
    k, v = (split_slots(x, rings + kept + sinks) for x in (slots.k, slots.v))
    score, position = split_slots(slots.score, rings + kept), split_slots(slots.position, kept)
    return [
        NearState(
            NearRing(k[i], v[i], score[i] if spec.pairs else None),
            SinkKeys(k[2 * n + i], v[2 * n + i]) if spec.sinks else None,
            KeptPairs(k[n + i], v[n + i], score[n + i], position[i]) if spec.pairs else None,
            own,
        )
        for i, ((spec, _), own) in enumerate(zip(parts, length.unbind(), strict=True))
    ]


def _some(x: T | None) -> T:
    """x, which is there in states of W slots and P kept pairs."""
    assert x is not None
    return x
