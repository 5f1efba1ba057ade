"""What a layer that replaces softmax attention must say of itself: `Mixer`, its `Call` and its state.

Legend: B batch, H query heads, KV key heads, N tokens, D key size, Dv value size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lolcats.errors import LolcatsError
from lolcats.mixers.rotation import Reach, Rotation
from lolcats.mixers.state import StateSpec, put_rows, take_rows


class Sizes(NamedTuple):
    """Of what arrives at a layer."""

    heads: int
    kv_heads: int
    head_dim: int
    """D, of queries and keys."""
    value_dim: int
    """Dv."""
    hidden_size: int
    """d_model, of the layer's input."""


@dataclass
class Call:
    """What a layer works on: the tokens of one forward pass."""

    q: Tensor
    """[B, H, N, D], as the model attends with it: after norms and rotary embedding."""
    k: Tensor
    """[B, KV, N, D]."""
    v: Tensor
    """[B, KV, N, Dv]."""
    hidden: Tensor
    """[B, N, d_model], the input of the attention module."""
    scale: float
    """Of the scores q k."""
    padding: Tensor | None = None
    """[B, N] bool, False at padding, left or right; None where there is none."""
    segments: Tensor | None = None
    """[B, N] int64, equal numbers for tokens of one packed text, negative at padding; None for a text a row."""
    softcap: float | None = None
    """Cap of the scores (Gemma 2)."""
    sink_logits: Tensor | None = None
    """[H], learned sinks (gpt-oss)."""
    rotation: Rotation | None = None
    """The rotary embedding of q and k, for mixers that ask for it by `needs_rotation`."""
    reach: Reach | None = None
    """How far the model was made to look back, where that is known."""
    end: int | None = None
    """No text is longer after this call; None where that is not known."""

    def unrotated(self) -> tuple[Tensor, Tensor]:
        """q and k before rotary embedding, shapes and dtypes as they are.

        Raises:
            LolcatsError: the layer was not given its rotation.
        """
        k = self.unrotated_keys()
        assert self.rotation is not None
        return self.rotation.undo(self.q), k

    def unrotated_keys(self) -> Tensor:
        """k likewise."""
        if self.rotation is None:
            raise LolcatsError("expected a call with its rotary embedding; set `needs_rotation` in the mixer")
        return self.rotation.undo(self.k)


class FarParts(Protocol):
    """A layer's far half beside the teacher's attention to the same keys."""

    def direction_error(self) -> Tensor:
        """Of what the far half gives, [B, N]."""
        ...

    def share_error(self) -> Tensor:
        """Of how much of it the layer takes, [B, N]."""
        ...


class Mixer(nn.Module):
    """Base of the layers. A subclass takes `sizes` and values, and has float32 parameters of its own.

    Args:
        sizes: of what arrives.
        impl: implementation of its operation ("auto" or a name that the operation knows).
    """

    modes: tuple[str, ...] = ("full",)
    """What `forward` and `step` can compute: "full" is the layer itself, the others are controls."""
    targets: tuple[str, ...] = ("full",)
    """What attention transfer can compare with the teacher: the outputs "full" and "far" (`target_output`), "parts"."""
    settings: Any = None
    """What its operation is told, with its `window` and `sinks`; None for a layer without a window."""
    output_learns: bool = True
    """Whether its output depends on parameters of its own that attention transfer is to teach."""
    side_learns: bool = False
    """Whether `side_loss` has something to teach."""
    needs_rotation: ClassVar[bool] = False
    """Whether it calls `Call.unrotated`."""

    def __init__(self, sizes: Sizes, impl: str) -> None:
        super().__init__()
        self.sizes = sizes
        self.impl = self.eager_impl = impl

    @property
    def learns(self) -> bool:
        """Whether attention transfer can teach it anything."""
        return self.side_learns or (self.output_learns and any(True for _ in self.parameters()))

    @classmethod
    def build(cls, sizes: Sizes, *, impl: str, **values: Any) -> Mixer:
        """The layer from the values of its settings."""
        return cls(sizes, impl, **values)

    def forward(
        self, call: Call, state: Any = None, *, keep: bool = False, mode: str = "full"
    ) -> tuple[Tensor, Any | None]:
        """The layer over a text, or over its next part; with a state and one token to `keep`, a decoding step.

        Args:
            call: the tokens.
            state: after the tokens before them, None at the start of a text. Packed texts start without one. A decoding
                step may write the new state over it.
            keep: also return the state after the last token; of packed texts that of the last one of each row.
            mode: one of `modes`.

        Returns:
            The output [B, H, N, Dv], 0 at padding, differentiable in everything; and the state, None unless `keep`.
        """
        raise NotImplementedError

    def step(self, call: Call, state: Any, *, slots: Tensor | None = None, mode: str = "full") -> tuple[Tensor, Any]:
        """The layer at one more token of each text (N = 1).

        Args:
            call: the token of each row.
            state: of these rows; with `slots`, a pool of states of more rows.
            slots: [B] int64, the texts' rows of the pool, each at most once; -1 is no text, whose output means nothing.
            mode: one of `modes`.

        Returns:
            The output [B, H, 1, Dv], and the new state, for which the memory of the old one may be used; with `slots`
            the pool itself, changed in place.
        """
        # By way of the module's call, which brings its weights where they are kept elsewhere (accelerate's offloading).
        if slots is None:
            return self(call, state, keep=True, mode=mode)
        out, new = self(call, take_rows(state, slots), keep=True, mode=mode)
        put_rows(state, new, slots)
        return out, state

    def empty_state(self, rows: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
        """The state of `rows` texts before any token, in a model of this dtype; also a new pool."""
        raise NotImplementedError

    def state_spec(self, dtype: torch.dtype) -> StateSpec:
        """What one text's state is in a model of this dtype: all that caches, pools and engines need to know."""
        return StateSpec.of(self.empty_state(1, dtype))

    def start(self, call: Call, teacher: Tensor) -> None:
        """Set parameters from one batch of the teacher, of whose attention `teacher` [B, H, N, Dv] is the output.

        Called where the layer's settings say that it starts from text; there is nothing to do by default.
        """

    @contextmanager
    def windowed(self, window: int | None) -> Iterator[None]:
        """Inside, the layer has a window of so many tokens; None: its own."""
        own = self.settings
        if window is not None:
            self.settings = own._replace(window=window)
        try:
            yield
        finally:
            self.settings = own

    @property
    def near_tokens(self) -> int:
        """The first tokens of a text, whose queries see all keys before them in window and sinks."""
        return self.settings.window + self.settings.sinks

    @property
    def steps_a_write(self) -> int:
        """Decoding steps of a text in which its sums are written once; read they are in each."""
        return 1

    def parts(self, call: Call) -> FarParts:
        """The far part of the teacher's attention and the layer's, where "parts" is one of `targets`."""
        raise NotImplementedError

    def target_output(self, call: Call, target: str) -> Tensor:
        """The output [B, H, N, Dv] that attention transfer compares with the teacher's: "full" or "far"."""
        assert target == "full", target
        return self(call)[0]

    def side_loss(self, call: Call) -> Tensor | None:
        """A loss of stage 1 beside the transfer, for parameters that the layer's output says nothing of; or None."""
        return None

    def inside(self, call: Call) -> Any:
        """What the layer does with whole texts, one in each row: a `lolcats.mixers.inside.Inside`."""
        raise NotImplementedError

    def attention_weights(self, call: Call) -> Tensor:
        """The weights [B, H, N, N] with which the layer sums values, for losses on them; O(N^2) memory.

        Raises:
            LolcatsError: the layer has none.
        """
        raise LolcatsError(
            f"{type(self).__name__} has no attention weights to compare with the teacher's; set transfer.xent_factor=0"
        )

    @property
    def plain_impl(self) -> str:
        """The implementation of code that is not compiled here."""
        # Compilation is for training on equal shapes; prompts differ in length.
        return self.eager_impl if self.impl == "compiled" else self.impl

    def widened(self, tokens: int) -> Mixer:
        """The same layer as exact softmax attention over `tokens` tokens, sharing this one's parameters.

        Used by the self-check, which compares it with the plain model.

        Raises:
            LolcatsError: it has no such form.
        """
        raise LolcatsError(f"{type(self).__name__} has no form that is softmax attention, so nothing can be checked")
