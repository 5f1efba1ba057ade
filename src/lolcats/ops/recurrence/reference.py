"""The definition of a recurrence: a loop over tokens, in float32 or float64. Every faster form answers to it.

For one state head, S_0 = 0 or the state that came in, and g_i the logarithm of the decay, a number or one per channel:

    without beta:   S_i = Diag(exp(g_i)) S_(i-1) + k_i v_i^T
    with beta:      S' = Diag(exp(g_i)) S_(i-1),    S_i = S' + beta_i k_i (v_i - k_i^T S')^T
    out_i = scale q_i S_i,    normalised: divided by q_i z_i, where z_i is S_i for values of 1; 0 where q_i z_i is 0

A text packed behind another one begins with g_i = -inf, which leaves nothing of what came before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lolcats.ops.recurrence.layout import Inputs, Spec, Sums, divided, first_sums, in_sums_dtype


def reference_recurrence(inputs: Inputs, spec: Spec, return_state: bool) -> tuple[Tensor, Sums | None]:
    """The recurrence token by token; arguments as checked by `recurrence`."""
    inputs = in_sums_dtype(inputs)
    q = inputs.q.unflatten(1, (inputs.k.shape[1], -1))  # [B, S, G, N, F]
    sums = first_sums(inputs, spec)
    outputs = []
    for i in range(q.shape[3]):
        sums = _next_sums(inputs, i, sums)
        out = q[:, :, :, i] @ sums.kv  # [B, S, G, Dv]
        if sums.k_sum is not None:
            out = divided(out, (q[:, :, :, i] @ sums.k_sum[..., None])[..., 0])
        outputs.append(spec.scale * out.flatten(1, 2))
    return torch.stack(outputs, 2), sums if return_state else None


def _next_sums(inputs: Inputs, i: int, sums: Sums) -> Sums:
    """The sums after token i."""
    k, v = inputs.k[:, :, i, :, None], inputs.v[:, :, i, None]  # [B, S, F, 1] and [B, S, 1, Dv]
    kv, k_sum = sums
    if inputs.log_decay is not None:
        g = inputs.log_decay[:, :, i]
        decay = (g if g.ndim == 3 else g[..., None]).exp()  # [B, S, F or 1]
        kv = decay[..., None] * kv
        k_sum = None if k_sum is None else decay * k_sum
    if inputs.beta is not None:
        v = inputs.beta[:, :, i, None, None] * (v - k.mT @ kv)
    return Sums(kv + k * v, None if k_sum is None else k_sum + k[..., 0])
