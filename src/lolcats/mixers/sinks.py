"""How sinks see the queries of tokens beyond the model's context: as they would be at its end.

The first tokens stay where they are while a text goes on, and distances that a model was not made for ruin it.

Legend: B batch, H query heads, N tokens, D key size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats.mixers.base import Call
from lolcats.mixers.near_heads import BlendState
from lolcats.ops.near.prepared import SinkCall


def positions_of(call: Call, state: BlendState | None, slots: Tensor | None) -> Tensor:
    """[B, N], of the tokens of a call in their texts, a text in each row; with `slots` the state is a pool."""
    rows, n = call.q.shape[0], call.q.shape[2]
    position = torch.arange(n, device=call.q.device)
    if state is not None:
        position = (state.length if slots is None else state.length[slots])[:, None] + position
    return position.expand(rows, n)


def may_be_beyond(call: Call, state: BlendState | None, sinks: int) -> bool:
    """Whether there are sinks, and a token of the call may be later than all that the model was made for."""
    if call.reach is None or call.rotation is None or not sinks:
        return False
    end = call.q.shape[2] if call.end is None and state is None else call.end
    return end is None or end > call.reach.tokens


def sink_call(call: Call, state: BlendState | None, sinks: int) -> SinkCall | None:
    """What kernels of a step make `sink_queries` from; None where no query can be so late."""
    if not may_be_beyond(call, state, sinks):
        return None
    assert call.reach is not None and call.rotation is not None
    last = call.reach.rotation.to(call.q.device)
    return SinkCall(*call.rotation, last.cos, last.sin, call.reach.tokens)


def capped_queries(call: Call, state: BlendState | None, sinks: int) -> Tensor | None:
    """Queries [B, H, N, D] as they would be at the end of the model's context; None where none can be so late."""
    if not may_be_beyond(call, state, sinks):
        return None
    assert call.reach is not None and call.rotation is not None
    return call.reach.capped(call.q, call.rotation)


def sink_queries(call: Call, state: BlendState | None, slots: Tensor | None, capped: Tensor | None) -> Tensor | None:
    """Queries [B, H, N, D] as sinks see them: `capped_queries` beyond the model's context, all others as they are."""
    if capped is None or call.reach is None:
        return capped
    beyond = positions_of(call, state, slots) >= call.reach.tokens
    return torch.where(beyond[:, None, :, None], capped, call.q)
