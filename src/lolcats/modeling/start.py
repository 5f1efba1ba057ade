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
from torch import Tensor, nn

from lolcats.errors import LolcatsError
from lolcats.modeling.attention import AttentionCall, LinearizedAttention
from lolcats.modeling.softmax import softmax_with_sinks
from lolcats.ops.hybrid.layout import pair_masks
from lolcats.ops.hybrid.scores import cap_scores

MATCHED_WINDOW_FACTOR = 4.0
"""sigmoid(4) = 0.982."""
OFFSETS = tuple(0.5 * i - 6.0 for i in range(15))
"""-6 .. 1. At exp(-6) of its share the linear half is all but off, yet its gradient has not vanished."""
SMALLEST_MASS = 1e-30
"""Less than this is taken for no linear half at all."""
MAX_ROWS, MAX_TOKENS = 4, 2048
"""Texts and tokens of each that are looked at: the computation is quadratic."""


class _Halves(NamedTuple):
    """What both halves give at the queries of one text that have far keys (M of them)."""

    teacher: Tensor  # [H, M, Dv] softmax output
    share: Tensor  # [H, M] teacher's attention on far keys
    near: Tensor  # [H, M, Dv] numerator of the softmax half
    near_mass: Tensor  # [H, M]
    far: Tensor  # [H, M, Dv] numerator of the linear half
    far_mass: Tensor  # [H, M]


@torch.no_grad()
def match_start(model: nn.Module, layers: list[LinearizedAttention], input_ids: Tensor) -> None:
    """Set window factors and query scales of `layers` from one batch.

    Args:
        model: the converted model, still with the teacher's weights.
        layers: its linearized layers.
        input_ids: [B, N]; N must exceed the window, or nothing is far and the scales stay as they are. Use texts as
            long as those that matter: the linear mass grows with length.
    """
    for layer in layers:
        layer.observer = _match
    try:
        device = next(model.parameters()).device
        model(input_ids=input_ids[:MAX_ROWS, :MAX_TOKENS].to(device), use_cache=False)
    finally:
        for layer in layers:
            layer.observer = None


def _match(layer: LinearizedAttention, call: AttentionCall, teacher: Tensor) -> None:
    layer.window_factor.fill_(MATCHED_WINDOW_FACTOR)
    if not bool(teacher.isfinite().all()):
        raise LolcatsError(
            f"the matched start reads the teacher's attention, and that of layer {layer.layer_idx} is not finite; look "
            "whether the teacher's weights are, or take another dtype"
        )
    rows = [_halves(layer, call, teacher, row) for row in range(call.q.shape[0])]
    if rows[0].share.shape[1] == 0:
        return
    both = _Halves(*(torch.cat(parts, 1) for parts in zip(*rows, strict=True)))
    share = both.share.mean(-1).clamp(1e-4, 1 - 1e-4)
    odds = torch.logit(share) - torch.log(both.far_mass / both.near_mass).mean(-1)
    # Without a softmax half (no window, no sinks) there is nothing that the features' scale is weighed against, and
    # without a linear half (features that are 0, say) no scale makes one.
    weighed = (both.near_mass > 0).all(-1) & (both.far_mass > SMALLEST_MASS).any(-1) & odds.isfinite()
    matched = torch.where(weighed, odds, 0.0)
    errors = torch.stack([_output_error(both, matched + offset) for offset in OFFSETS])
    best = errors.argmin(0)
    scale = torch.where(weighed, matched + torch.tensor(OFFSETS, device=matched.device)[best], 0.0)
    layer.query_scale.copy_(scale)


def _output_error(halves: _Halves, scale: Tensor) -> Tensor:
    """Mean squared error [H] of the hybrid's output with phi_q scaled by exp(scale [H])."""
    gate = torch.sigmoid(torch.tensor(MATCHED_WINDOW_FACTOR))
    factor = scale.exp()[:, None]
    numerator = gate * halves.near + factor[..., None] * halves.far
    denominator = gate * halves.near_mass + factor * halves.far_mass
    return (numerator / denominator[..., None] - halves.teacher).square().mean((1, 2))


def _halves(layer: LinearizedAttention, call: AttentionCall, teacher: Tensor, row: int) -> _Halves:
    """Both halves of one text, by the quadratic formula; one text at a time because of its memory."""
    heads, n = call.q.shape[1], call.q.shape[2]
    position = torch.arange(n, device=call.q.device)
    near, far = pair_masks(position[:, None], position[None], layer.settings, None)
    near = near | (position[None] < layer.settings.sinks) & (position[None] <= position[:, None])
    queries = far.any(-1)
    near, far = near[queries], far[queries]
    k, v = (x[row].float().repeat_interleave(heads // x.shape[1], 0) for x in (call.k, call.v))
    scores = cap_scores(call.q[row, :, queries].float() @ k.mT * call.scale, call.softcap)
    seen = scores.masked_fill(~(near | far), -torch.inf)
    share = (softmax_with_sinks(seen, call.sink_logits) * far).sum(-1)
    weights, sink_weight = _near_weights(scores.masked_fill(~near, -torch.inf), call.sink_logits)
    phi_q, phi_k = layer.feature_q(call.q)[row, :, queries], layer.feature_k(call.k)[row]
    linear = phi_q @ phi_k.repeat_interleave(heads // phi_k.shape[0], 0).mT
    log_decay = layer.log_decay(call.hidden)
    if log_decay is not None:
        total = log_decay[row].cumsum(-1)
        between = total[:, queries, None] - total[:, None, :]
        linear = linear * torch.exp(between.masked_fill(~far, 0.0))
    linear = linear * far
    target = teacher[row, :, queries].float()
    near_mass, far_mass = weights.sum(-1) + sink_weight, linear.sum(-1).clamp_min(SMALLEST_MASS)
    return _Halves(target, share, weights @ v, near_mass, linear @ v, far_mass)


def _near_weights(scores: Tensor, sink_logits: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """Weights [H, M, N] of the softmax half, and the one [H, M] of a learned sink."""
    if sink_logits is None:
        return torch.exp(scores - scores.amax(-1, keepdim=True)), 0.0
    logit = sink_logits.float()[:, None, None]
    top = torch.maximum(scores.amax(-1, keepdim=True), logit)
    return torch.exp(scores - top), torch.exp(logit - top).squeeze(-1)
