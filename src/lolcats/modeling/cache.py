"""The cache of a linearized layer: its mixer's state, whose size does not depend on how many tokens were seen.

It lives in transformers' own `Cache`, beside the layers of other kinds. `DynamicCache` and `StaticCache` build their
layers from `config.layer_types`, which the families also use to choose masks, so a linearized layer cannot announce
itself there; instead it takes its place in the cache at its first call (`linearized_layer`).
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from lolcats.errors import LolcatsError
from lolcats.mixers import State, map_state, state_tensors
from lolcats.mixers.state import state_bytes as bytes_of
from lolcats.modeling.taking_back import CanRefuse, Point, Record, refuse_first


class Past(NamedTuple):
    """What the cache of a layer holds before a call, in the terms of a mask."""

    seen: int | Tensor = 0
    """Tokens so far, padding counted: the column of the first new token in a mask; a tensor in a static cache."""
    length: Tensor | None = None
    """[B]: tokens that the state stands for (neither padding nor an earlier document); None where there is no state."""
    whole: bool = True
    """Whether the state surely stands for all tokens so far."""
    passes: int = 0
    """Changes with each call in eager code: tells one forward pass from the next without asking the device."""
    cached: bool = False
    """Whether there is a cache."""
    cache: weakref.ref[Cache] | None = None
    """Which one; only in eager code."""


class LinearizedLayer(CacheLayerMixin, CanRefuse):
    """State of one linearized attention layer."""

    is_compileable = False
    is_croppable = False  # not everything that was read can be taken back
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.seen = 0
        self.passes = 0
        self.whole = True
        self.record = Record()  # by which tokens can be taken back

    def activate_past_recording(self) -> None:
        """Have `crop` take back tokens of long calls too; transformers calls this before assisted generation."""
        self.record.long = True

    @property
    def point(self) -> Point:
        """Where the layer is."""
        return Point(self.state, self.seen, self.whole)

    def advance(self, state: State, tokens: int, whole: bool = True) -> None:
        """Keep the state after `tokens` more tokens (padding counted: `seen` is what position counters use).

        `whole` says that every one of them is in the state: none was padding or of a document that is over.
        """
        self.state = state
        self.seen += tokens
        self._note(whole)
        self.is_initialized = True

    def _note(self, whole: bool) -> None:
        if not torch.compiler.is_compiling():  # numbers that change would have a step compiled again and again
            self.passes += 1
            self.whole = self.whole and whole

    @property
    def nbytes(self) -> int:
        """Bytes held, for the whole batch."""
        return 0 if self.state is None else bytes_of(self.state)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the first call of the attention layer brings the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: a linearized layer keeps no keys and values that another attention could use."""
        raise LolcatsError("the cache of a linearized layer can only be used by that layer; got an update from another")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that masks speak of: all tokens so far."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def tokens_back(self, tokens_to_remove: int) -> int:
        """How many tokens `crop` takes back.

        Raises:
            LolcatsError: so many cannot be taken back; the message says how many can.
        """
        seen = int(self.get_seq_length())
        count = max(0, seen - tokens_to_remove) if tokens_to_remove > 0 else -tokens_to_remove
        if count and self.is_initialized:
            self.record.check(count, seen)
            return count
        return 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last n tokens for -n; for n > 0 leave n, as older releases of transformers ask.

        Raises:
            LolcatsError: as `tokens_back`; nothing has changed.
        """
        if count := self.tokens_back(tokens_to_remove):
            self.state, self.seen, self.whole = self.record.back(count, self.seen)
            self.is_initialized, self.passes = self.state is not None, self.passes + 1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen, self.is_initialized, self.whole = None, 0, False, True
        self.record.clear()

    def _map(self, fn: Any) -> None:
        self.record.clear()
        if self.state is not None:
            self.state = map_state(self.state, fn)

    def detach(self) -> None:
        """Keep the state without its gradient."""
        self._map(Tensor.detach)

    def offload(self) -> None:
        """Move the state to the CPU."""
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Nothing to do: the layer moves its state to its own device when it runs."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in the order of `beam_idx` [B]."""
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        self._map(lambda t: t[indices.to(t.device)])


class StaticLinearizedLayer(LinearizedLayer):
    """The same in tensors that never move, for `torch.compile` and CUDA graphs: each step is copied into place.

    Args:
        max_cache_len: what `StaticCache` was made for. Masks have this length; the state itself has no limit.
    """

    is_compileable = True

    def __init__(self, max_cache_len: int) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.counter = torch.tensor(0)
        self._buffers: State | None = None

    def advance(self, state: State, tokens: int, whole: bool = True) -> None:
        """Write the state after `tokens` more tokens over the old one."""
        self._hold(state)
        self._note(whole)
        if not self.is_initialized:
            self.counter = self.counter.to(state.length.device)
            _keep_address([self.counter])
        self.counter.add_(tokens)
        self.is_initialized = True

    def _hold(self, state: State) -> None:
        self.record.clear()  # of states that are written over nothing comes back
        if self._buffers is not None and same_form(self._buffers, state):
            overwrite(self._buffers, state)
        else:
            self._buffers = map_state(state, lambda t: t.clone(memory_format=torch.contiguous_format))
            _keep_address(state_tensors(self._buffers))
        self.state = self._buffers

    def _map(self, fn: Any) -> None:
        if self.state is not None:
            self._hold(map_state(self.state, fn))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that masks speak of: all that the cache was made for."""
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        """Tokens seen so far: a tensor, so that a compiled step is not compiled again for each token."""
        return self.counter if self.is_initialized else 0

    def get_max_length(self) -> int:
        """What the cache was made for."""
        return self.max_cache_len

    def reset(self) -> None:
        """Forget everything; the tensors stay where they are."""
        super().reset()
        self.counter.zero_()


def same_form(one: State, other: State) -> bool:
    """Whether two states have tensors of the same shapes, dtypes and devices."""
    forms = [[(t.shape, t.dtype, t.device) for t in state_tensors(state)] for state in (one, other)]
    return forms[0] == forms[1]


def overwrite(held: State, new: State) -> None:
    """Write a state over another of the same form, whose tensors stay where they are."""
    for old, tensor in zip(state_tensors(held), state_tensors(new), strict=True):
        if old is not tensor:
            old.copy_(tensor)


def _keep_address(tensors: list[Tensor]) -> None:
    """Tell the compiler that these tensors stay where they are."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def past_of(cache: Cache | None, layer_idx: int, tokens: int = 0) -> Past:
    """What `cache` holds for a layer before a call of `tokens`, whether the layer is linearized already or not."""
    if cache is None:
        return Past()
    which = None if torch.compiler.is_compiling() else weakref.ref(cache)
    if layer_idx >= len(cache.layers):
        return Past(cached=True, cache=which)
    layer: Any = cache.layers[layer_idx]
    if _shares_keys(layer):  # it shares the keys of a layer that has had this call's tokens already
        seen = cache.get_seq_length() - tokens
    else:
        seen = layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0
    if isinstance(seen, Tensor):
        seen = seen.clone()  # a static layer counts in place
    if not isinstance(layer, LinearizedLayer) or layer.state is None:
        return Past(seen, cached=True, cache=which)
    return Past(seen, layer.state.length, layer.whole, layer.passes, True, which)


def _shares_keys(layer: object) -> bool:
    """Whether transformers keeps a place for a layer that attends to the keys of another; older releases keep none."""
    dummy = getattr(cache_utils, "DummyLayer", None)
    return dummy is not None and isinstance(layer, dummy)


def _static_length(cache: Cache) -> int | None:
    """What a static cache was made for; None of any other cache."""
    static = [layer for layer in cache.layers if isinstance(layer, StaticLayer | StaticLinearizedLayer)]
    return int(static[0].max_cache_len) if static else None


def linearized_layer(cache: Cache, layer_idx: int) -> LinearizedLayer:
    """The linearized layer at `layer_idx`, put there in place of an empty one at its first use.

    Raises:
        LolcatsError: the cache already holds tokens of a softmax layer at this place.
    """
    while len(cache.layers) <= layer_idx:
        cache.layers.append(DynamicLayer())
    if layer_idx > 0 and not isinstance(cache.layers[layer_idx - 1], LinearizedLayer):
        refuse_first(cache)
    layer = cache.layers[layer_idx]
    if isinstance(layer, LinearizedLayer):
        return layer
    held = 0 if _shares_keys(layer) else int(cache.get_seq_length(layer_idx))  # it shares another's keys
    if held > 0:
        raise LolcatsError(
            f"expected an empty cache or one filled by this linearized model; layer {layer_idx} holds "
            f"{held} tokens of softmax attention (of another model, or of a model that runs its layers several times "
            "in one pass, which cannot be linearized)"
        )
    length = _static_length(cache) if _shares_keys(layer) or isinstance(layer, StaticLayer) else None
    new = LinearizedLayer() if length is None else StaticLinearizedLayer(length)
    cache.layers[layer_idx] = new
    return new


def to_device(state: State, device: torch.device) -> State:
    """The state on `device` (itself where it is there already)."""
    return state if state.length.device == device else map_state(state, lambda t: t.to(device))
