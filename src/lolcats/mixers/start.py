"""The matched start: set each head's linear share from one batch of the teacher, before any training.

For a head let f be the teacher's mean attention outside window and sinks, and L_i, W_i the masses of the linear and
the softmax half at query i. Scaling phi_q of the head by exp(s), s = logit(f) - mean_i log(L_i / W_i), gives the linear
half the teacher's share. But untrained features put that share on the wrong keys, and the errors of all layers add up:
see docs/studies.md for what this costs. So the share is then lowered where that brings the head's output nearer to the
teacher's: of s + `OFFSETS`, the one with the smallest squared error is taken. The window factor is set near 1.
Training then starts near the training-free window with sinks instead of far above it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lolcats.mixers.base import Call
from lolcats.mixers.softmax import softmax_with_sinks
from lolcats.ops import HybridSpec
from lolcats.ops.hybrid.layout import pair_masks
from lolcats.ops.hybrid.scores import cap_scores

MATCHED_WINDOW_FACTOR = 4.0
"""sigmoid(4) = 0.982."""
OFFSETS = tuple(0.5 * i - 6.0 for i in range(15))
"""-6 .. 1. At exp(-6) of its share the linear half is all but off, yet its gradient has not vanished."""
SMALLEST_MASS = 1e-30
"""Less than this is taken for no linear half at all."""


class Features(NamedTuple):
    """What the linear half makes of a batch before any training."""

    phi_q: Tensor
    """[B, H, N, F], without the scale that is sought."""
    phi_k: Tensor
    """[B, H or KV, N, F]."""
    log_decay: Tensor | None
    """[B, H, N], or None."""


class Halves(NamedTuple):
    """What both halves give at the queries of one text that have far keys (M of them)."""

    teacher: Tensor
    """[H, M, Dv], the softmax output."""
    share: Tensor
    """[H, M], the teacher's attention on far keys."""
    near: Tensor
    """[H, M, Dv], the numerator of the softmax half."""
    near_mass: Tensor
    """[H, M]."""
    far: Tensor
    """[H, M, Dv], the numerator of the linear half."""
    far_mass: Tensor
    """[H, M]."""


@torch.no_grad()
def matched_scale(call: Call, teacher: Tensor, settings: HybridSpec, features: Features) -> Tensor | None:
    """Log of the scale of phi_q, [H], with which a window factor of `MATCHED_WINDOW_FACTOR` goes.

    Args:
        call: texts without padding. Use texts as long as those that matter: the linear mass grows with length.
        teacher: [B, H, N, Dv], the output of softmax attention.
        settings: window and sinks.
        features: of the same texts.

    Returns:
        None where the texts are no longer than the window: nothing is far.
    """
    rows = [halves(call, teacher, settings, features, row) for row in range(call.q.shape[0])]
    if rows[0].share.shape[1] == 0:
        return None
    both = Halves(*(torch.cat(parts, 1) for parts in zip(*rows, strict=True)))
    share = both.share.mean(-1).clamp(1e-4, 1 - 1e-4)
    odds = torch.logit(share) - torch.log(both.far_mass / both.near_mass).mean(-1)
    # Without a softmax half (no window, no sinks) there is nothing that the features' scale is weighed against, and
    # without a linear half (features that are 0, say) no scale makes one.
    weighed = (both.near_mass > 0).all(-1) & (both.far_mass > SMALLEST_MASS).any(-1) & odds.isfinite()
    matched = torch.where(weighed, odds, 0.0)
    errors = torch.stack([_output_error(both, matched + offset) for offset in OFFSETS])
    best = errors.argmin(0)
    return torch.where(weighed, matched + torch.tensor(OFFSETS, device=matched.device)[best], 0.0)


def _output_error(both: Halves, scale: Tensor) -> Tensor:
    """Mean squared error [H] of the hybrid's output with phi_q scaled by exp(scale [H])."""
    gate = torch.sigmoid(torch.tensor(MATCHED_WINDOW_FACTOR))
    factor = scale.exp()[:, None]
    numerator = gate * both.near + factor[..., None] * both.far
    denominator = gate * both.near_mass + factor * both.far_mass
    return (numerator / denominator[..., None] - both.teacher).square().mean((1, 2))


def halves(call: Call, teacher: Tensor, settings: HybridSpec, features: Features, row: int) -> Halves:
    """Both halves of one text, by the quadratic formula; one text at a time because of its memory."""
    heads, n = call.q.shape[1], call.q.shape[2]
    position = torch.arange(n, device=call.q.device)
    near, far = pair_masks(position[:, None], position[None], settings, None)
    near = near | (position[None] < settings.sinks) & (position[None] <= position[:, None])
    queries = far.any(-1)
    near, far = near[queries], far[queries]
    k, v = (x[row].float().repeat_interleave(heads // x.shape[1], 0) for x in (call.k, call.v))
    scores = cap_scores(call.q[row, :, queries].float() @ k.mT * call.scale, call.softcap)
    seen = scores.masked_fill(~(near | far), -torch.inf)
    share = (softmax_with_sinks(seen, call.sink_logits) * far).sum(-1)
    weights, sink_weight = _near_weights(scores.masked_fill(~near, -torch.inf), call.sink_logits)
    phi_q, phi_k = features.phi_q[row, :, queries], features.phi_k[row]
    linear = phi_q @ phi_k.repeat_interleave(heads // phi_k.shape[0], 0).mT
    if features.log_decay is not None:
        total = features.log_decay[row].cumsum(-1)
        between = total[:, queries, None] - total[:, None, :]
        linear = linear * torch.exp(between.masked_fill(~far, 0.0))
    linear = linear * far
    target = teacher[row, :, queries].float()
    near_mass, far_mass = weights.sum(-1) + sink_weight, linear.sum(-1).clamp_min(SMALLEST_MASS)
    return Halves(target, share, weights @ v, near_mass, linear @ v, far_mass)


def _near_weights(scores: Tensor, sink_logits: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """Weights [H, M, N] of the softmax half, and the one [H, M] of a learned sink."""
    if sink_logits is None:
        return torch.exp(scores - scores.amax(-1, keepdim=True)), 0.0
    logit = sink_logits.float()[:, None, None]
    top = torch.maximum(scores.amax(-1, keepdim=True), logit)
    return torch.exp(scores - top), torch.exp(logit - top).squeeze(-1)
