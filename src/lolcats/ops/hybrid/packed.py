"""Packed texts with a state in and a state out for each: `cu_seqlens`, as in flash attention's calls of varying length.

Where no state is asked for, the texts stay packed. Where one is, each text becomes a row of a batch, padded on the
right, which every implementation knows how to start from a state and how to leave with one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lolcats.ops.hybrid.layout import Inputs, empty_state
from lolcats.ops.types import HybridOutput, HybridSpec, HybridState

Run = Callable[[Inputs, bool], HybridOutput]
"""An implementation: the inputs and whether it returns a state."""


def packed_attention(run: Run, inputs: Inputs, cuts: list[int], return_state: bool) -> HybridOutput:
    """`run` on T texts that lie one after the other in one row.

    Args:
        inputs: of a batch of 1, its state (if any) of a batch of T.
        cuts: where the texts begin, and where the last one ends: T + 1 numbers, `cu_seqlens`.
        return_state: also return the states after the texts, a batch of T.
    """
    if inputs.state is None and not return_state:
        counts = torch.tensor(cuts).diff()
        ids = torch.arange(len(counts)).repeat_interleave(counts)
        return run(inputs._replace(segment_ids=ids[None].to(inputs.q.device)), False)
    device = inputs.q.device
    start, end = torch.tensor(cuts, device=device).unfold(0, 2, 1).unbind(1)
    longest = max(b - a for a, b in itertools.pairwise(cuts))
    token = start[:, None] + torch.arange(longest, device=device)  # [T, longest]
    real = token < end[:, None]
    token = token.clamp(max=cuts[-1] - 1)
    rows = over_tokens(inputs, lambda x: x[0, :, token].transpose(0, 1))
    out, state = run(rows._replace(attention_mask=real), return_state)
    return HybridOutput(out.transpose(0, 1)[:, real][None], state)


def one_by_one(run: Run, inputs: Inputs, spec: HybridSpec, cuts: list[int], return_state: bool) -> HybridOutput:
    """The definition of `packed_attention`: each text alone."""
    outputs: list[Tensor] = []
    states: list[Any] = []
    for text, (begin, end) in enumerate(itertools.pairwise(cuts)):
        state = None if inputs.state is None else inputs.state.map(lambda t, i=text: t[i : i + 1])
        if begin < end:
            alone = over_tokens(inputs, lambda x, a=begin, b=end: x[:, :, a:b])
            out, state = run(alone._replace(state=state), return_state)
            outputs.append(out)
        elif state is None:
            state = empty_state(inputs, spec)
        states.append(state)
    return HybridOutput(torch.cat(outputs, 2), _joined(states) if return_state else None)


def over_tokens(inputs: Inputs, fn: Callable[[Tensor], Tensor]) -> Inputs:
    """The inputs with `fn` applied to the tensors [B, h, N, ...] that hold something of each token."""
    q, k, v, phi_q, phi_k = (fn(x) for x in inputs[:5])
    log_decay = None if inputs.log_decay is None else fn(inputs.log_decay)
    return inputs._replace(q=q, k=k, v=v, phi_q=phi_q, phi_k=phi_k, log_decay=log_decay)


def _joined(states: list[HybridState]) -> HybridState:
    """One state of the rows of all."""
    columns = zip(*(state.tensors() for state in states), strict=True)
    return states[0].map(lambda _: torch.cat(next(columns)))
