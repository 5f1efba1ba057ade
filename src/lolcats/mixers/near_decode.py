"""The near half of `blend` at one more token of each text, by kernels for all key heads at once.

In torch, and a group of key heads after the other (`near_heads.near_half`), it is some 85 small operations a layer,
each of which takes longer to launch than to run. Where the kernels do not take a step, that is what runs.
"""

from __future__ import annotations

from torch import Tensor

from lolcats.mixers.base import Call
from lolcats.mixers.near_heads import HeadGroup, NearStates, joined_states, near_half
from lolcats.mixers.scores import KeyScores
from lolcats.ops.near import NearPart, NearState, near_steps
from lolcats.ops.near.prepare import prepare_refusal, prepare_step
from lolcats.ops.near.prepared import Prepared, SinkCall
from lolcats.ops.near.quantize import PairCodec
from lolcats.ops.near.step import step_refusal


def prepared_step(
    groups: tuple[HeadGroup, ...],
    call: Call,
    states: NearStates,
    *,
    score: KeyScores | None,
    rotated: bool,
    slots: Tensor | None,
    codec: PairCodec | None,
    impl: str,
    sinks: SinkCall | None = None,
) -> Prepared | None:
    """What the kernels of a step need of its token; None where they do not take the step, or it needs no preparing.

    Args:
        groups: the key heads of the layer by their sizes.
        call: of one token in each row.
        states: after the tokens before it; with `slots` pools.
        score: of keys, where pairs are kept. It is not among what is prepared where no kernel can make it.
        rotated: whether the score reads keys as they are after their rotation.
        slots: [B], rows of the pools, or None.
        codec: of the stored pairs of all key heads, or None.
        impl: of near attention.
        sinks: of `sink_call`; or None.
    """
    if call.q.shape[2] != 1:
        return None
    told = None if score is None else score.told(call, rotated)
    parts, tokens = _parts(groups, call, states), (call.q, call.k, call.v)
    if (codec, told, sinks) == (None, None, None) or prepare_refusal(*tokens, codec=codec, score=told) is not None:
        return None
    if step_refusal(*tokens, parts, slots, call.sink_logits, codec, impl) is not None:
        return None
    length = parts[0].state.length
    return prepare_step(*tokens, codec=codec, score=told, length=length, state_indices=slots, sinks=sinks)


def near_of_call(
    groups: tuple[HeadGroup, ...],
    call: Call,
    states: NearStates | None,
    ready: Prepared | None,
    *,
    score: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
    slots: Tensor | None,
    codec: PairCodec | None,
    impl: str,
    sink_q: Tensor | None,
) -> tuple[Tensor, NearStates | None]:
    """`near_heads.near_half`, by the kernels of a step where they take it.

    Args:
        ready: of `prepared_step`, or None.
        sink_q: of `sink_queries` where that has not made them. All others are as there.
    """
    if states is not None and keep and call.q.shape[2] == 1:
        q, k, v = (call.q, call.k, call.v) if ready is None else ready[:3]
        sink_q = sink_q if ready is None else ready.sink_q
        done = near_steps(
            q, k, v, _parts(groups, call, states), score=score, active=lengths, sink_logits=call.sink_logits,
            sink_q=sink_q, state_indices=slots, donate=True, codec=codec, impl=impl, mapped=ready is not None,
        )  # fmt: skip
        assert done is not None or ready is None, "what was prepared for the kernel was refused by it"
        if done is not None:
            return done[0], joined_states(done[1])
    return near_half(
        groups, call, states, score=score, lengths=lengths, keep=keep, slots=slots, codec=codec, impl=impl,
        sink_q=sink_q,
    )  # fmt: skip


def _parts(groups: tuple[HeadGroup, ...], call: Call, states: NearStates) -> list[NearPart]:
    """The groups as a step takes them."""
    each = (states,) if isinstance(states, NearState) else states
    return [NearPart(group.told(call), state, group.heads) for group, state in zip(groups, each, strict=True)]
