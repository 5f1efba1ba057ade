"""The near half of `blend`, whose key heads may differ in window and kept pairs.

Key heads of the same sizes are a group: it runs near attention over its own heads and has a state of its own, so no
state is padded to that of the largest head. Where all heads are alike there is one group, whose state stands alone, and
nothing is copied.

Legend: B batch, H query heads, KV key heads, N tokens, D key size, Dv value size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lolcats.mixers.base import Call, Sizes
from lolcats.mixers.state import map_state, state_bytes
from lolcats.ops.devices import without_autocast
from lolcats.ops.near import (
    NearSpec,
    NearState,
    empty_near_state,
    kept_until,
    near_attention,
    near_attentions,
    near_step,
)
from lolcats.ops.near.quantize import PairCodec, measure_keys, plain_map
from lolcats.ops.near.types import Coded

Split = tuple[tuple[int, int], ...]
"""(window, kept pairs) of each key head."""
LENGTH_BYTES = 8
"""Of the length of the text, which the state of each group holds."""
NearStates = NearState | tuple[NearState, ...]
"""The state of the one group, or those of several."""


class BlendState(NamedTuple):
    """What the layer keeps of earlier tokens."""

    near: NearStates
    """Of the near half: of all key heads, or of each group of them."""
    far: Any
    """Of the far half, None without."""

    @property
    def length(self) -> Tensor:
        """[B] int64."""
        return self.near.length if isinstance(self.near, NearState) else self.near[0].length


class HeadGroup(NamedTuple):
    """Key heads of the same sizes."""

    spec: NearSpec
    heads: tuple[int, ...]
    """Their numbers in the layer, ascending."""
    kv_heads: int
    """KV, of the whole layer."""

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """What belongs to the group of x, which has one or more entries for each key head of the layer along `dim`."""
        if len(self.heads) == self.kv_heads:
            return x
        each = x.shape[dim] // self.kv_heads
        parts = [
            x.narrow(dim, head * each, each) for head in self.heads
        ]  # no index, which a GPU would have to wait for
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def told(self, call: Call) -> NearSpec:
        """What near attention is told."""
        reach = None if call.reach is None else call.reach.tokens
        return self.spec._replace(scale=call.scale, softcap=call.softcap, reach=reach)

    def codec(self, codec: PairCodec | None) -> PairCodec | None:
        """That of the layer for these heads."""
        return None if codec is None else PairCodec(codec.bits, self.take(codec.key_map))


def read_split(split: Sequence[int] | Sequence[Sequence[int]], kv_heads: int) -> Split:
    """A layer's entry of `linearization.split`: [window, pairs] of all key heads, or a list of them, one for each.

    Raises:
        ValueError: not as many as there are key heads.
    """
    if split and not isinstance(split[0], Sequence):
        return ((int(split[0]), int(split[1])),) * kv_heads  # type: ignore[arg-type]
    sizes = tuple((int(window), int(pairs)) for window, pairs in split)  # type: ignore[misc]
    if len(sizes) != kv_heads:
        raise ValueError(f"expected [window, pairs] for {kv_heads} key heads; got {len(sizes)}")
    return sizes


def group_heads(spec: NearSpec, split: Split | None, kv_heads: int) -> tuple[HeadGroup, ...]:
    """The groups of a layer: one without `split`, whose sizes take the place of those of `spec`."""
    # A layer asks for them several times in a call. A compiler cannot follow what remembers.
    return (_group_heads if torch.compiler.is_compiling() else _remembered_groups)(spec, split, kv_heads)


def _group_heads(spec: NearSpec, split: Split | None, kv_heads: int) -> tuple[HeadGroup, ...]:
    if split is None:
        return (HeadGroup(spec, tuple(range(kv_heads)), kv_heads),)
    heads: dict[tuple[int, int], list[int]] = {}
    for head, sizes in enumerate(split):
        heads.setdefault(sizes, []).append(head)
    return tuple(
        HeadGroup(spec._replace(window=window, pairs=pairs), tuple(found), kv_heads)
        for (window, pairs), found in heads.items()
    )


_remembered_groups = functools.lru_cache(maxsize=4096)(_group_heads)


def keeps_pairs(groups: tuple[HeadGroup, ...]) -> bool:
    """Whether a key head keeps pairs that left its window."""
    return any(group.spec.pairs for group in groups)


def windows_of(groups: tuple[HeadGroup, ...]) -> int | tuple[int, ...]:
    """The window of all key heads, or that of each where they differ."""
    by_head = {head: group.spec.window for group in groups for head in group.heads}
    windows = tuple(by_head[head] for head in range(len(by_head)))
    return windows if len(set(windows)) > 1 else windows[0]


def near_half(
    groups: tuple[HeadGroup, ...],
    call: Call,
    states: NearStates | None,
    *,
    score: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
    slots: Tensor | None,
    codec: PairCodec | None,
    impl: str,
    sink_q: Tensor | None = None,
) -> tuple[Tensor, NearStates | None]:
    """Near attention of a call, group by group where it is not to be had for all of them at once.

    Args:
        groups: of the layer.
        call: a text in each row, padding on the right only.
        states: after the tokens before them, or None; with `slots` pools, which are changed in place.
        score: [B, KV, N], where pairs are kept.
        lengths: [B] real tokens of each row, or None.
        keep: also return the states; with a state and one token it is a decoding step.
        slots: [B], rows of the pools.
        codec: of the stored pairs of all key heads, or None.
        impl: of near attention.
        sink_q: [B, H, N, D], queries as sinks see them, or None.

    Returns:
        The output [B, H, N, Dv] and, with `keep`, the states.
    """
    before = (None,) * len(groups) if states is None else (states,) if isinstance(states, NearState) else states
    whole: dict[str, Any] = {
        "score": score,
        "sink_logits": call.sink_logits,
        "sink_q": sink_q,
        "codec": codec,
        "impl": impl,
    }
    coded = None
    if states is not None and keep and call.q.shape[2] == 1:
        if codec is not None:  # once, not by each group
            k, v = codec.encode(call.k, call.v)
            call = replace(call, k=k, v=v)
    else:
        if codec is not None:
            with without_autocast(call.k.device.type):
                coded = codec.coded(call.k, call.v, keep)
        done = near_attentions(
            call.q, call.k, call.v, tuple((group.told(call), group.heads) for group in groups), lengths=lengths,
            initial_states=None if states is None else [state for state in before if state is not None],
            return_state=keep, coded=coded, **whole,
        )  # fmt: skip
        if done is not None:
            return done[0], None if done[1] is None else joined_states(done[1])
    outs, after = zip(
        *(_one_group(group, call, state, lengths, keep, slots, coded, whole)
          for group, state in zip(groups, before, strict=True)),
        strict=True,
    )  # fmt: skip
    return _join(groups, list(outs)), joined_states(list(after)) if keep else None


def _one_group(
    group: HeadGroup,
    call: Call,
    state: NearState | None,
    lengths: Tensor | None,
    keep: bool,
    slots: Tensor | None,
    coded: Coded | None,
    whole: dict[str, Any],
) -> tuple[Tensor, NearState | None]:
    """A group's output and state; `whole` is what step and attention have in common, for all key heads."""
    score, logits, sink_q = whole["score"], whole["sink_logits"], whole["sink_q"]
    how = whole | {
        "score": group.take(score) if score is not None and group.spec.pairs else None,
        "sink_logits": None if logits is None else group.take(logits, 0),
        "sink_q": None if sink_q is None else group.take(sink_q),
        "codec": group.codec(whole["codec"]),
    }
    q, k, v = (group.take(x) for x in (call.q, call.k, call.v))
    spec = group.told(call)
    if state is not None and keep and q.shape[2] == 1:
        return near_step(q, k, v, state, spec, active=lengths, state_indices=slots, donate=True, **how)
    own = None if coded is None else coded.of(group.take)
    return near_attention(q, k, v, spec, lengths=lengths, initial_state=state, return_state=keep, coded=own, **how)


def empty_near(
    groups: tuple[HeadGroup, ...],
    sizes: Sizes,
    rows: int,
    dtype: torch.dtype,
    device: torch.device | str,
    bits: int,
) -> NearStates:
    """The states of `rows` texts before any token, in a model of this dtype, with pairs of so many bits."""
    states = []
    for group in groups:
        shape = (rows, len(group.heads), 1)
        k, v = (torch.zeros(*shape, size, dtype=dtype, device=device) for size in (sizes.head_dim, sizes.value_dim))
        state = empty_near_state(k, v, group.spec)
        if bits < 16:  # nobody reads these pairs, and the layer's own map may be on another device
            key_map = plain_map(len(group.heads), sizes.head_dim, device)
            state = map_state(PairCodec(bits, key_map).encode_empty(state), _own)
        states.append(state)
    return joined_states(states)


def key_map_of(call: Call) -> Tensor:
    """Which channels of the keys matter in these texts, for a codec."""
    channels = torch.arange(call.k.shape[3], device=call.k.device)
    return measure_keys(call.q, call.k, channels if call.rotation is None else call.rotation.partners(channels))


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def kept_until_of(groups: tuple[HeadGroup, ...], call: Call, score: Tensor, lengths: Tensor | None) -> Tensor:
    """`kept_until` of all key heads, [B, KV, N]; 0 for those that keep no pairs."""
    found = []
    for group in groups:
        k, v, marks = (group.take(x) for x in (call.k, call.v, score))
        nothing = torch.zeros(marks.shape, dtype=torch.int64, device=marks.device)
        found.append(kept_until(k, v, group.spec, marks, lengths) if group.spec.pairs else nothing)
    return _join(groups, found)


@functools.lru_cache(maxsize=65536)
def head_bytes(spec: NearSpec, sizes: Sizes, dtype: torch.dtype, bits: int) -> int:
    """Bytes of the state of one text for one key head, without the length of the text (`LENGTH_BYTES`)."""
    state = empty_near(
        group_heads(spec, None, 1), sizes._replace(kv_heads=1), 1, dtype, "cpu", bits
    )  # quicker than on "meta"
    return state_bytes(state) - LENGTH_BYTES


def joined_states(states: list[NearState]) -> NearStates:
    return states[0] if len(states) == 1 else tuple(states)


def _join(groups: tuple[HeadGroup, ...], outs: list[Tensor]) -> Tensor:
    """What groups have [B, one or more of each key head, N, ...], in the order of the layer's heads."""
    if len(groups) == 1:
        return outs[0]
    parts = {
        head: part
        for group, out in zip(groups, outs, strict=True)
        for head, part in zip(group.heads, out.chunk(len(group.heads), 1), strict=True)
    }
    return torch.cat([parts[head] for head in range(len(parts))], 1)
