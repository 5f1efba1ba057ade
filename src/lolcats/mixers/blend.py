"""`blend`: exact attention over what is near or kept, and a far half, joined by an explicit share.

    y = (1 - lambda) y_near + lambda y_far,        lambda = sigmoid(w.x + b), for each query head

y_near is softmax attention over sinks, window and kept pairs (`lolcats.ops.near`), y_far linear attention over all keys
(`lolcats.mixers.far`) with q and k before their rotation, unless `rotate_far`.

| mode         | what it is                                            |
|--------------|-------------------------------------------------------|
| full         | the layer                                             |
| near_only    | without its far half                                  |
| window_only  | without its far half and its kept pairs               |
| linear_only  | its far half alone                                    |
| no_attention | outputs of zero                                       |
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lolcats.mixers.base import Call, Mixer, Sizes
from lolcats.mixers.far import FarHalf
from lolcats.mixers.inside import Inside, keeper, near_inside
from lolcats.mixers.near_decode import near_of_call, prepared_step
from lolcats.mixers.near_heads import (
    BlendState,
    HeadGroup,
    Split,
    empty_near,
    group_heads,
    keeps_pairs,
    key_map_of,
    read_split,
    windows_of,
)
from lolcats.mixers.parts import Parts, Share, far_attention, far_beyond_kept
from lolcats.mixers.recurrent import build_far
from lolcats.mixers.scores import KeyScores
from lolcats.mixers.sinks import capped_queries, positions_of, sink_call, sink_queries
from lolcats.mixers.state import put_rows, take_rows
from lolcats.mixers.texts import find_texts, one_text, rows_of
from lolcats.ops.near import NearSpec
from lolcats.ops.near.prepared import Prepared
from lolcats.ops.near.quantize import PairCodec, plain_map
from lolcats.ops.near.selection import EMPTY
from lolcats.ops.types import map_state

NOT_FAR, BLIND = ("near_only", "window_only", "no_attention"), ("window_only", "linear_only", "no_attention")
"""Modes that leave the far half out, and modes that keep no pairs."""


class BlendMixer(Mixer):
    """See the module.

    Args:
        sizes: of what arrives.
        impl: implementation of the operations.
        near: window, sinks and kept pairs (the scale comes with each call); of `split` the most pairs in the model.
        far: the far half, or None.
        score: of kept pairs, None without.
        rotate_far: give the far half q and k as they are after rotary embedding.
        bits: of the stored pairs' numbers: 16 (as they are), 8 or 4.
        split: window and kept pairs of each key head, in the place of those of `near`; None where all are alike.
    """

    needs_rotation: ClassVar[bool] = True

    def __init__(
        self,
        sizes: Sizes,
        impl: str,
        near: NearSpec,
        far: FarHalf | None,
        score: KeyScores | None,
        rotate_far: bool = False,
        bits: int = 16,
        split: Split | None = None,
    ) -> None:
        super().__init__(sizes, impl)
        self.settings, self.split, self.far, self.score = near, split, far, score
        self.rotate_far, self.near_alone = rotate_far, far is None
        self.side_learns = score is not None and score.network is not None
        alone = ("near_only",) if far is not None and (near.pairs or keeps_pairs(self.groups)) else ()  # in all layers
        self.modes = ("full", *alone, "window_only", *(() if far is None else ("linear_only",)), "no_attention")
        self.targets = ("full",) if far is None else ("full", "far", "parts")
        self.bits, self.output_learns = bits, far is not None
        self.key_map: Tensor | None
        # Integers, which no change of the model's dtype rounds; plain until the start from text measures them.
        self.register_buffer("key_map", None if bits == 16 else plain_map(sizes.kv_heads, sizes.head_dim))
        self.share = None if far is None else Share(sizes)

    @classmethod
    def build(  # type: ignore[override]  # the names of its settings are its own
        cls, sizes: Sizes, *, impl: str, window: int, sinks: int, kept: dict[str, Any], rotate_far: bool, bits: int,
        split: list[Any] | None = None, **of_far: Any,
    ) -> BlendMixer:  # fmt: skip
        """The layer from the values of its settings; those that are not named are `build_far`'s."""
        rules = {name: kept[name] for name in ("mix", "fade", "recall_error")}
        heads = None if split is None else read_split(split, sizes.kv_heads)
        spec = NearSpec(window, sinks, kept["pairs"], sizes.head_dim**-0.5)
        keeps = keeps_pairs(group_heads(spec, heads, sizes.kv_heads))
        score = KeyScores(sizes, kept["score"], **rules) if keeps else None
        return cls(sizes, impl, spec, build_far(sizes, impl, **of_far), score, rotate_far, bits, heads)

    @property
    def groups(self) -> tuple[HeadGroup, ...]:
        """The key heads by their sizes."""
        return group_heads(self.settings, self.split, self.sizes.kv_heads)

    def forward(
        self, call: Call, state: BlendState | None = None, *, keep: bool = False, mode: str = "full"
    ) -> tuple[Tensor, BlendState | None]:
        """See `Mixer.forward`."""
        return self._run(call, state, keep, mode)

    def step(
        self, call: Call, state: BlendState, *, slots: Tensor | None = None, mode: str = "full"
    ) -> tuple[Tensor, BlendState]:
        """See `Mixer.step`."""
        if slots is None:
            return super().step(call, state, mode=mode)
        out, new = self._run(call, BlendState(state.near, take_rows(state.far, slots)), True, mode, slots)
        if state.far is not None and new is not None and new.far is not None:
            put_rows(state.far, new.far, slots)
        return out, state

    def _run(
        self, call: Call, state: BlendState | None, keep: bool, mode: str, slots: Tensor | None = None
    ) -> tuple[Tensor, BlendState | None]:
        """The layer; with `slots` the near state is a pool, in which the rows of a decoding step are."""
        ready = self._prepared(call, state, mode, slots) if keep and state is not None else None
        is_scored, asked = ready is not None and ready.score is not None, self._asked(mode)
        fresh = None if is_scored or asked is None else asked.by_kernel(call, self.rotate_far, self.near_impl)
        far_reads = not self.near_alone or (self.score is not None and not is_scored and fresh is None)
        q, k = self._for_far(call) if far_reads else (call.q, call.k)
        sink_q = None if ready is not None else capped_queries(call, state, self.settings.sinks)
        n, texts = call.q.shape[2], find_texts(call.padding, call.segments)
        if texts is not None:
            assert state is None or call.segments is None, "packed texts start without a state"
            call, q, k = rows_of(call, texts), texts.take(q), texts.take(k)
            sink_q = None if sink_q is None else texts.take(sink_q)
            fresh = None if fresh is None else texts.take(fresh[..., None])[..., 0]
        lengths = None if texts is None else texts.lengths
        out, new = self._rows(call, q, k, lengths, state, keep, mode, slots, sink_q, ready, fresh)
        if texts is None:
            return out, new
        if new is not None and call.q.shape[0] != len(texts.last):
            new = map_state(new, lambda t: t.index_select(0, texts.last))
        return texts.put_back(out, n), new

    def _rows(
        self, call: Call, q: Tensor, k: Tensor, lengths: Tensor | None, state: BlendState | None, keep: bool, mode: str,
        slots: Tensor | None, sink_q: Tensor | None, ready: Prepared | None, fresh: Tensor | None,
    ) -> tuple[Tensor, BlendState | None]:  # fmt: skip
        """A text in each row, padding on the right only; q and k are the far half's, or as they come where nobody
        reads them; `sink_q` is of `capped_queries`, `fresh` of `KeyScores.by_kernel`.
        """
        near, far = (None, None) if state is None else state
        if mode == "linear_only" and not keep and self.far is not None:  # nobody looks at the near half
            return self.far(q, k, call.v, call.hidden, call.padding, far, False)[0], None
        if (score := None if ready is None else ready.score) is None:
            score = self._scores(call, k, state, mode, slots, fresh)
        y, near = near_of_call(
            self.groups, call, near, ready, score=score, lengths=lengths, keep=keep, slots=slots, codec=self.codec,
            impl=self.near_impl, sink_q=sink_queries(call, state, slots, sink_q),
        )  # fmt: skip
        if self.far is not None and not self.near_alone and (mode not in NOT_FAR or keep):
            y_far, far = self.far(q, k, call.v, call.hidden, call.padding, far, keep)
            y = self._join(y, y_far, call.hidden, mode)
        y = torch.zeros_like(y) if mode == "no_attention" else y
        return y, BlendState(near, far) if keep and near is not None else None

    def _asked(self, mode: str) -> KeyScores | None:
        """What scores keys in a mode, if anything is kept."""
        return self.score if keeps_pairs(self.groups) and mode not in BLIND else None

    def _prepared(self, call: Call, state: BlendState, mode: str, slots: Tensor | None) -> Prepared | None:
        return prepared_step(
            self.groups, call, state.near, score=self._asked(mode), rotated=self.rotate_far, slots=slots,
            codec=self.codec, impl=self.near_impl, sinks=sink_call(call, state, self.settings.sinks),
        )  # fmt: skip

    @property
    def codec(self) -> PairCodec | None:
        """How pairs are stored, None as they are."""
        return None if self.bits == 16 or self.key_map is None else PairCodec(self.bits, self.key_map)

    @property
    def near_impl(self) -> str:
        """Of near attention, which has no form for each name that far halves know."""
        return self.impl if self.impl in ("auto", "triton", "chunked", "reference") else "chunked"

    def _join(self, near: Tensor, far: Tensor, hidden: Tensor, mode: str) -> Tensor:
        if mode in NOT_FAR or mode == "linear_only":
            return near if mode in NOT_FAR else far
        assert self.share is not None
        return self.share.join(near, far, hidden)

    def _for_far(self, call: Call) -> tuple[Tensor, Tensor]:
        """q and k of the far half and of the score."""
        if self.rotate_far or (self.near_alone and self.score is None):
            return call.q, call.k
        return (call.q, call.unrotated_keys()) if self.near_alone else call.unrotated()  # q is the far half's alone

    @torch.no_grad()
    def _scores(
        self, call: Call, k: Tensor, state: BlendState | None = None, mode: str = "full", slots: Tensor | None = None,
        fresh: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """The score [B, KV, N] of each key, None without kept pairs."""
        if self.score is None or not keeps_pairs(self.groups):
            return None
        rows, kv_heads, n = call.k.shape[:3]
        if mode in BLIND:
            return torch.full((rows, kv_heads, n), EMPTY, device=k.device)
        position = positions_of(call, state, slots)
        if fresh is not None:
            return self.score.faded(fresh, position)
        return self.score(call, k, position, windows_of(self.groups), partial(self._recall, k, call, state))

    def _recall(self, k: Tensor, call: Call, state: BlendState | None) -> Tensor:
        """The error [B, KV, N] with which the far half recalls the values of a call."""
        assert self.far is not None
        return self.far.recall(k, call.v, call.hidden, call.padding, None if state is None else state.far)

    def target_output(self, call: Call, target: str) -> Tensor:
        """See `Mixer.target_output`; "far" is the far half alone, which is to give the teacher's whole output."""
        return self(call, mode="linear_only" if target == "far" else "full")[0]

    @contextmanager
    def windowed(self, window: int | None) -> Iterator[None]:
        """See `Mixer.windowed`; all key heads have it."""
        own = self.split
        self.split = own if window is None or own is None else tuple((window, pairs) for _, pairs in own)
        try:
            with super().windowed(window):
                yield
        finally:
            self.split = own

    @property
    def near_tokens(self) -> int:
        """See `Mixer.near_tokens`; those of the key head with the smallest window."""
        return min(group.spec.window for group in self.groups) + self.settings.sinks

    def parts(self, call: Call) -> Parts:
        """See `Mixer.parts`; near is what the layer sees: sinks, window, and the pairs that it keeps."""
        assert self.share is not None
        k, texts = self._for_far(call)[1], find_texts(call.padding, call.segments)
        rows, k = (call, k) if texts is None else (rows_of(call, texts), texts.take(k))
        teacher = far_beyond_kept(rows, self.groups, self._scores(rows, k), texts, call.q.shape[2])
        return Parts(teacher, self.share(call.hidden), self.target_output(call, "far"))

    def inside(self, call: Call) -> Inside:
        """See `Mixer.inside`."""
        q, k = self._for_far(call)
        found = near_inside(self.groups, call, self._scores(call, k), self.codec)
        if self.score is not None and keeps_pairs(self.groups):
            found = found._replace(keep=keeper(self.groups, call, k, self.score, partial(self._recall, k, call, None)))
        if self.near_alone or self.far is None or self.share is None:
            return found
        return found.joined(self.far.sums(q, k, call.hidden), self.share(call.hidden), self.far.decays(call.hidden))

    def side_loss(self, call: Call) -> Tensor | None:
        """The error of a learned score, from one text of the batch."""
        if self.score is None:
            return None
        few, k = one_text(call, self._for_far(call)[1])
        return self.score.loss(few, k, windows_of(self.groups), partial(self._recall, k, few, None))

    def empty_state(self, rows: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> BlendState:
        """See `Mixer.empty_state`."""
        near = empty_near(self.groups, self.sizes, rows, dtype, device, self.bits)
        return BlendState(near, None if self.far is None else self.far.empty_state(rows, dtype, device))

    @torch.no_grad()
    def start(self, call: Call, teacher: Tensor) -> None:
        """Give each head's share the mean attention of the teacher beyond sinks and window.

        Where pairs are stored in fewer bits, also measure which channels of the keys matter.
        """
        if self.key_map is not None:
            self.key_map.copy_(key_map_of(call))
        if self.share is not None:
            self.share.match(far_attention(call, self.groups).mass, windows_of(self.groups), self.settings.sinks)

    def widened(self, tokens: int) -> BlendMixer:
        """The layer with a window over the whole text and without its far half."""
        wide = copy.copy(self)
        wide.near_alone, wide.bits, wide.split = True, 16, None
        wide.settings = self.settings._replace(window=max(1, tokens), pairs=0)
        return wide
