"""What a near half of another size would cost the model: the Fisher estimate of a divergence, for each key head.

Let y be the output of a query head of the teacher at a token, g the gradient with respect to it of the loss of labels
that are drawn from the teacher's own predictions, and y(w, P) what sinks, a window of w and the P kept pairs of the
highest attention to come (`scores.attention_given`, or a guess at it) would give. Then E[(g . (y(w, P) - y))^2] is, to
second order, twice the divergence of the predictions from the teacher's, other heads being as they are: with such
labels E[g g^T] is the Fisher information. The cost of (w, P) for a key head is the mean over the tokens of its sum
over the query heads.

g . v_j is a number for each query and key, so a query's output at every size comes out of sums of numbers: along the
keys for all windows, and along the keys in the order of their scores for all numbers of pairs.

Legend: H query heads, KV key heads, N tokens, D key size, Dv value size, C queries of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lolcats.mixers.base import Call
from lolcats.mixers.scores import attention_given_beyond
from lolcats.mixers.softmax import softmax_with_sinks
from lolcats.ops.hybrid.scores import cap_scores

QUERIES = 512
"""Of a text that are looked at, evenly spaced."""
QUERY_BLOCK = 128
"""Queries whose attention is in memory at once."""
GUESS_ERROR = 1.0
"""Standard deviation of the error of a guess at the logs of the attention to come. Without one the pairs that are kept
would be the best ones always, which makes them cheaper than they will be: of 0 and 1, 1 was better after stage 1."""
GUESS_SEED = 0
"""Of these errors: the same text gives the same costs, in every process."""
SMALLEST_MASS = 1e-12
"""Of what is seen, by which it is divided."""


@torch.no_grad()
def near_costs(
    call: Call,
    gradient: Tensor,
    windows: Sequence[int],
    pairs: Sequence[int],
    sinks: int,
    mix: float = 1.0,
    guess: torch.Generator | None = None,
) -> Tensor:
    """The cost of each window with each number of pairs, for each key head.

    Args:
        call: a whole text (B = 1) without padding.
        gradient: [1, H, N, Dv], of the loss with respect to the heads' outputs.
        windows: w of each, ascending.
        pairs: P of each, ascending.
        sinks: first tokens that are always seen.
        mix: weight of the largest attention in the oracle's score, the rest is the sum's.
        guess: where pairs are chosen without knowing what comes, the generator (on the CPU, see `guessing`) of the
            errors that the scores then have; None for the oracle's.

    Returns:
        [KV, windows, pairs] float64.
    """
    heads, n = call.q.shape[1:3]
    kv_heads, device = call.k.shape[1], call.q.device
    total = torch.zeros(kv_heads, len(windows), len(pairs), dtype=torch.float64, device=device)
    orders = _orders(call, windows, mix, guess) if max(pairs) else []
    chosen = torch.arange(n - 1, -1, -max(1, n // QUERIES), device=device).flip(0)
    for queries in chosen.split(QUERY_BLOCK):
        weights, gain = _weights_and_gains(call, gradient, queries)
        sums = _Sums(weights, gain)
        for number, window in enumerate(windows):
            seen = sums.near(queries, window, sinks)  # [2, H, C]
            kept = torch.zeros(len(pairs), *seen.shape, device=device)
            if orders:
                kept = sums.kept(orders[number], queries, window, sinks, pairs)
            mass, value = (seen + kept).unbind(1)  # [P, H, C]
            missed = 1 - sums.whole[0]  # what a learned sink takes has no value and stays in the denominator
            error = value / (mass + missed.clamp_min(0)).clamp_min(SMALLEST_MASS) - sums.whole[1]
            by_head = error.double().square().sum(-1).unflatten(1, (kv_heads, heads // kv_heads)).sum(2)
            total[:, number] += by_head.T
    return total / len(chosen)


def guessing() -> torch.Generator:
    """The errors of guessed scores, to be drawn for one layer and text after the other."""
    return torch.Generator().manual_seed(GUESS_SEED)


def _orders(call: Call, windows: Sequence[int], mix: float, guess: torch.Generator | None) -> list[Tensor]:
    """Keys [KV, N] from the highest score to the lowest, for each window; a key's error is the same for all windows."""
    whole = replace(call, padding=None, segments=None)
    logs = (given[0].unbind(-1) for given in attention_given_beyond(whole, windows))
    scores = (mix * largest + (1 - mix) * summed for largest, summed in logs)
    error: Tensor | float = 0.0
    if guess is not None:
        error = GUESS_ERROR * torch.randn(call.k.shape[1:3], generator=guess).to(call.k.device)
    return [(score + error).argsort(dim=-1, descending=True, stable=True) for score in scores]


def _weights_and_gains(call: Call, gradient: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's attention [H, C, E] of some queries on the E keys up to the last of them, and g . v_j [H, C, E]."""
    end = int(queries[-1]) + 1
    groups = call.q.shape[1] // call.k.shape[1]
    k, v = (x[0, :, :end].float().repeat_interleave(groups, 0) for x in (call.k, call.v))
    scores = cap_scores(call.q[0][:, queries].float() @ k.mT * call.scale, call.softcap)
    hidden = torch.arange(end, device=queries.device) > queries[:, None]
    weights = softmax_with_sinks(scores.masked_fill(hidden, -torch.inf), call.sink_logits)
    return weights, gradient[0][:, queries].float() @ v.mT


class _Sums:
    """Sums over keys of attention, and of attention times g . v_j, for a block of queries.

    Args:
        weights: [H, C, E]; gain: [H, C, E].
    """

    def __init__(self, weights: Tensor, gain: Tensor) -> None:
        self.both = torch.stack([weights, weights * gain])  # [2, H, C, E]
        self.until = nnf.pad(self.both.double().cumsum(-1), (1, 0))
        """Sums over the keys before each: of windows they are differences, hence float64."""
        self.whole = self.until[..., -1].float()

    def near(self, queries: Tensor, window: int, sinks: int) -> Tensor:
        """Over sinks and window: [2, H, C]."""
        begin = (queries - window + 1).clamp_min(0)
        ends = torch.stack([queries + 1, begin, begin.clamp_max(sinks)], -1)  # the last: sinks before the window
        until, before, sink = self.until.gather(-1, ends.expand(*self.until.shape[:2], -1, -1)).unbind(-1)
        return (until - before + sink).float()

    def kept(self, order: Tensor, queries: Tensor, window: int, sinks: int, pairs: Sequence[int]) -> Tensor:
        """Over the first of the keys that have left, for each number of pairs: [P, 2, H, C].

        `order` [KV, N] has the keys by their scores.
        """
        end = max(0, int(queries[-1]) - window + 1)  # later keys have not left
        if end <= sinks:
            return self.both.new_zeros(len(pairs), *self.both.shape[:3])
        order = order[order < end].view(len(order), end)
        groups = self.both.shape[1] // len(order)
        left = (order[:, None] >= sinks) & (order[:, None] <= (queries - window)[:, None])  # [KV, C, E]
        rank = left.cumsum(-1, dtype=torch.int32)
        wanted = torch.tensor(pairs, device=order.device, dtype=torch.int32).expand(*rank.shape[:2], -1)
        # How many keys of the order there are until one too many has left.
        place = torch.searchsorted(rank, wanted.contiguous(), side="right").repeat_interleave(groups, 0)
        index = order.repeat_interleave(groups, 0)[:, None].expand(2, -1, len(queries), -1)
        until = self.both.gather(-1, index).mul_(left.repeat_interleave(groups, 0)).cumsum(-1)
        sums = until.gather(-1, (place - 1).clamp_min(0).expand(2, -1, -1, -1)) * (place > 0)
        return sums.permute(3, 0, 1, 2)
