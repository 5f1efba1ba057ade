"""The matched start: set each head's linear share to the teacher's before any training.

For a head let f be the teacher's mean attention outside window and sinks, and L_i, W_i the masses of the linear and
the softmax half at query i. phi_q of the head is scaled by exp(s), s = logit(f) - mean_i log(L_i / W_i), and the window
factor is set near 1. Training then starts near the training-free window with sinks instead of far above it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lolcats.modeling.attention import AttentionCall, LinearizedAttention
from lolcats.ops.hybrid.layout import pair_masks

MATCHED_WINDOW_FACTOR = 4.0
"""sigmoid(4) = 0.982."""
MAX_TOKENS = 1024
"""Tokens of each row that are looked at: the share is a mean, and the computation is quadratic."""


@torch.no_grad()
def match_start(model: nn.Module, layers: list[LinearizedAttention], input_ids: Tensor) -> None:
    """Set window factors and query scales of `layers` from one batch.

    Args:
        model: the converted model, still with the teacher's weights.
        layers: its linearized layers.
        input_ids: [B, N]; N must exceed the window, or nothing is far and the start stays as it is.
    """
    for layer in layers:
        layer.observer = _match
    try:
        model(input_ids=input_ids[:, :MAX_TOKENS].to(next(model.parameters()).device), use_cache=False)
    finally:
        for layer in layers:
            layer.observer = None


def _match(layer: LinearizedAttention, call: AttentionCall, _: Tensor) -> None:
    shares, ratios = [], []
    for row in range(call.q.shape[0]):  # one row at a time: memory is quadratic in N
        share, ratio = _masses(layer, call, row)
        shares.append(share)
        ratios.append(ratio)
    layer.window_factor.fill_(MATCHED_WINDOW_FACTOR)
    if ratios[0] is None:
        return
    share = torch.stack(shares).mean(0).clamp(1e-4, 1 - 1e-4)
    layer.query_scale.copy_(torch.logit(share) - torch.stack(ratios).mean(0))  # type: ignore[arg-type]


def _masses(layer: LinearizedAttention, call: AttentionCall, row: int) -> tuple[Tensor, Tensor | None]:
    """Teacher's far share [H] and mean log(L / W) [H] of one row; None where nothing is far."""
    heads, n = call.q.shape[1], call.q.shape[2]
    position = torch.arange(n, device=call.q.device)
    near, far = pair_masks(position[:, None], position[None], layer.settings, None)
    near = near | (position[None] < layer.settings.sinks) & (position[None] <= position[:, None])
    has_far = far.any(-1)
    repeat = heads // call.k.shape[1]
    scores = call.q[row].float() @ call.k[row].float().repeat_interleave(repeat, 0).mT * call.scale
    weights = scores.masked_fill(~(near | far), -torch.inf).softmax(-1)
    share = (weights * far).sum(-1)[:, has_far].mean(-1)
    if not bool(has_far.any()):
        return share, None
    top = scores.masked_fill(~near, -torch.inf).amax(-1, keepdim=True)
    softmax_mass = torch.exp(scores.masked_fill(~near, -torch.inf) - top).sum(-1)
    phi_q, phi_k = layer.feature_q(call.q)[row], layer.feature_k(call.k)[row]
    linear = phi_q @ phi_k.repeat_interleave(heads // phi_k.shape[0], 0).mT
    log_decay = layer.log_decay(call.hidden)
    if log_decay is not None:
        total = log_decay[row].cumsum(-1)
        linear = linear * torch.exp((total[..., :, None] - total[..., None, :]).masked_fill(~far, 0.0))
    linear_mass = (linear * far).sum(-1)
    return share, torch.log(linear_mass / softmax_mass)[:, has_far].mean(-1)
