"""What a layer of the cache keeps so that its last tokens can be taken back, as speculative decoding does.

A key that was added to a sum cannot be taken out again. But the tokens to be taken back are those of the last call, or
of a few steps of one token: a layer can keep its state from before that call, with the call itself, and read again what
of it is to stay; or its state from before each step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from lolcats.errors import LolcatsError
from lolcats.mixers import Call, Mixer, map_state, state_tensors

HELD = 64
"""Tokens of a call that are held (of all rows together, if nobody asks for it); also steps of one token."""


class Point(NamedTuple):
    """Where a layer of the cache was."""

    state: Any
    """None before the first token."""
    seen: int
    whole: bool
    """See `LinearizedLayer.advance`."""


class HeldCall(NamedTuple):
    """A call and what there was before it."""

    mixer: Mixer
    mode: str
    call: Call
    before: Point

    @property
    def tokens(self) -> int:
        """N."""
        return self.call.q.shape[2]

    @torch.no_grad()
    def after(self) -> Point:
        """Where the layer is after the call."""
        state, seen, whole = self.before
        if self.tokens == 1:  # a step may write over its state
            state = map_state(state, Tensor.clone)
        new = self.mixer(self.call, state, keep=True, mode=self.mode)[1]
        return Point(new, seen + self.tokens, whole and self.call.padding is None)


class Record:
    """The last call of several tokens and the steps after it, as far as they can be taken back. A copy holds nothing.

    Args:
        long: hold the last tokens of long calls too.
        single: hold steps of one token too, which costs a copy of the state each.
    """

    def __init__(self, long: bool = False, single: bool = False) -> None:
        self.long, self.single = long, single
        self.call: HeldCall | None = None
        self.steps: deque[Point] = deque(maxlen=HELD)
        """Where the layer was before each."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Record, (self.long, self.single)

    def clear(self) -> None:
        """Forget all that is held."""
        if not torch.compiler.is_compiling():
            self.call = None
            self.steps.clear()

    def parts(self, call: Call) -> list[Call]:
        """A call as it is to be read: a long one in two where its last tokens are to be held."""
        long = self.long and call.q.shape[2] > HELD
        return _last_tokens_apart(call) if long and _may_be_held(call) else [call]

    def prepare(self, held: HeldCall) -> None:
        """Hold a call that is going to be read, and forget what that makes useless."""
        if torch.compiler.is_compiling():
            return
        if held.tokens == 1 and held.before.state is not None:
            self.prepare_step(held.before)
        else:
            self.clear()
            size = (
                held.tokens if self.long else held.tokens * len(held.call.q)
            )  # unasked, batches of prompts are not held
            self.call = held if size <= HELD and _may_be_held(held.call) else None

    def prepare_step(self, before: Point) -> None:
        """The same for a step of one token, which may be written over the state that there is."""
        if not self.single:
            return self.clear()
        if len(self.steps) == HELD:
            self.call = None
        elif not self.steps and self.call is not None:  # its state may share tensors with the one that is written over
            self.map(partial(moved_out, {t.untyped_storage().data_ptr() for t in state_tensors(before.state)}))
        self.steps.append(before._replace(state=map_state(before.state, Tensor.clone)))

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Every tensor of the states that are held, changed by `fn`."""
        if self.call is not None:
            before = self.call.before
            self.call = self.call._replace(before=before._replace(state=map_state(before.state, fn)))
        for index, point in enumerate(self.steps):
            self.steps[index] = point._replace(state=map_state(point.state, fn))

    def tokens(self, seen: int) -> int:
        """How many of `seen` tokens can be taken back: none where something has moved on without this record."""
        held = len(self.steps) + (0 if self.call is None else self.call.tokens)
        first = self.call.before if self.call is not None else next(iter(self.steps), None)
        return held if first is not None and first.seen + held == seen else 0

    def check(self, count: int, seen: int) -> None:
        """Raise LolcatsError where it is not known what the layer was `count` of its `seen` tokens ago."""
        if count > (held := self.tokens(seen)):
            raise LolcatsError(
                f"a linearized model cannot forget its last {count} tokens (crop): {held} can be taken back. These are "
                f"the tokens of the last call, where it had 2 to {HELD} in all rows, in a DynamicCache and without "
                f"gradients; of a larger one the last {HELD} of each row, after cache.activate_past_recording(). "
                "Earlier ones are folded into the state: keep a copy of the cache from before them"
            )

    def back(self, count: int, seen: int) -> Point:
        """Where the layer was `count` of its `seen` tokens ago, if `check` allows; the others can be taken back yet."""
        self.check(count, seen)
        steps = min(count, len(self.steps))
        points = [self.steps.pop() for _ in range(steps)]
        if count == steps:
            return points[-1]
        assert self.call is not None
        stay, held_call = self.call.tokens - (count - steps), self.call
        self.call = held_call._replace(call=span(held_call.call, 0, stay)) if stay else None
        return held_call.before if self.call is None else self.call.after()


class CanRefuse(ABC):
    """A layer of the cache that may not be able to forget."""

    @abstractmethod
    def tokens_back(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` is to take back; raises LolcatsError where it cannot."""


class PartlyLinearizedCache(DynamicCache):
    """A cache in which a layer with softmax attention, which can forget any token, comes before a linearized one."""

    def crop(self, tokens_to_remove: int) -> None:
        """As there, but a layer that has to refuse does so before any other has forgotten something."""
        for layer in self.layers:
            if isinstance(layer, CanRefuse):
                layer.tokens_back(tokens_to_remove)
        super().crop(tokens_to_remove)


def refuse_first(cache: Cache) -> None:
    """Have the layers of a plain cache asked, from now on, before any of them forgets tokens."""
    if type(cache) is DynamicCache and not torch.compiler.is_compiling():
        cache.__class__ = PartlyLinearizedCache


def span(call: Call, start: int, stop: int) -> Call:
    """The tokens from `start` to `stop` of a call that is not packed."""
    rotation = call.rotation
    if rotation is not None:
        rotation = rotation._replace(cos=rotation.cos[:, start:stop], sin=rotation.sin[:, start:stop])
    return replace(
        call,
        **{name: getattr(call, name)[:, :, start:stop] for name in ("q", "k", "v")},
        hidden=call.hidden[:, start:stop],
        padding=None if call.padding is None else call.padding[:, start:stop],
        rotation=rotation,
        end=None if call.end is None else call.end - (call.q.shape[2] - stop),
    )


def moved_out(storages: set[int], tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is in one of these storages, which are going to be written to."""
    return tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor


def _may_be_held(call: Call) -> bool:
    """Whether the state from before a call can stand for it: packed texts have none, and gradients would go wrong."""
    return call.segments is None and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _last_tokens_apart(call: Call) -> list[Call]:
    """A long call in two, of which the second can be held: it keeps no memory of the first."""
    tokens = call.q.shape[2]
    first, last = span(call, 0, tokens - HELD), span(call, tokens - HELD, tokens)
    copies: dict[str, Any] = {name: getattr(last, name).clone() for name in ("q", "k", "v", "hidden")}
    if last.rotation is not None:
        copies["rotation"] = last.rotation._replace(cos=last.rotation.cos.clone(), sin=last.rotation.sin.clone())
    return [first, replace(last, **copies)]
