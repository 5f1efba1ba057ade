"""What `prepare_step` and `score_keys` are given, and what a step gets back.

Legend: B batch, H query heads, KV key heads, D key size, Dv value size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScoreWeights(NamedTuple):
    """Weights of a learned score, float32, each as a linear layer has them: [out, in] and [out]."""

    read_hidden: Tensor
    """[R, d_model]."""
    read_hidden_bias: Tensor
    read_pair: Tensor
    """[S, D + Dv]."""
    read_pair_bias: Tensor
    from_hidden: Tensor
    """[2 KV, R]: of each key head the logs of the largest and of the summed attention."""
    from_hidden_bias: Tensor
    from_pair: Tensor
    """[2, S]."""


class ScoreCall(NamedTuple):
    """A learned score that is wanted of the keys of a step or a text."""

    hidden: Tensor
    """[B, N, d_model], the layer's input; N is 1 in a decoding step."""
    weights: ScoreWeights
    mix: float
    """Weight of the largest attention; the rest is the sum's."""
    fade: int | None
    """Tokens after which a score has fallen by 1 against those of newer keys, or None."""
    resolution: int
    """Scores are rounded to multiples of one part in so many, a power of 2, before they fade."""
    cos: Tensor | None = None
    """[B or 1, N, P] of the rotation that the score does not see; None where it reads k as it is."""
    sin: Tensor | None = None
    layout: tuple[str, str, str] | None = None
    """pairs, place and angles of a `Layout` of `lolcats.mixers.rotation`."""


class SinkCall(NamedTuple):
    """Queries that are wanted as sinks see them: from the end of the model's context, where a text is longer."""

    cos: Tensor
    """[B or 1, 1, P] of the rotation of the step's tokens."""
    sin: Tensor
    layout: tuple[str, str, str]
    """As in `ScoreCall`."""
    last_cos: Tensor
    """[1, 1, R/2], one angle a pair, at the last position of the context."""
    last_sin: Tensor
    tokens: int
    """Of the context."""


class Prepared(NamedTuple):
    """One token of each text, ready for the state."""

    q: Tensor
    """[B, H, 1, D]; with a codec mapped by it."""
    k: Tensor
    """[B, KV, 1, D]; with a codec the bytes of it."""
    v: Tensor
    score: Tensor | None
    """[B, KV, 1] float32."""
    sink_q: Tensor | None = None
    """[B, H, 1, D], as q; None where not wanted."""
