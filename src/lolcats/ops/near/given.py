"""How much attention later queries give each key, by the Triton kernels where these can run."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor


def kernel_given(
    q: Tensor,
    k: Tensor,
    window: int | Sequence[int],
    *,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    least: float,
) -> Tensor | None:
    """log(weight + least) of the softmax over a whole text in each row, [B, KV, N, 2] float32; no gradients.

    First the largest weight that a query `window` or more tokens later gives the key, of all query heads of the key
    head, then the sum over these queries, mean over the query heads.

    Args:
        q: [B, H, N, D]; k: [B, KV, N, D], of one dtype, without padding.
        window: of all key heads, or of each, at least 1.
        scale: of the products; softcap: their cap; sink_logits: [H] learned sinks, in the denominators only.
        least: see above.

    Returns:
        None where the kernels cannot run: no CUDA device, no Triton, code that is compiled, sizes they do not take.
    """
    if not q.is_cuda or torch.compiler.is_compiling() or importlib.util.find_spec("triton") is None:
        return None
    # Not at the top: Triton is a requirement neither of this package nor of the code that `lolcats export` writes.
    from lolcats.ops.near.kernels.given import far_weights
    from lolcats.ops.near.kernels.launch import refusal

    q, k = q.detach(), k.detach()
    if refusal(q, k, k, False, None) is not None:
        return None
    return far_weights(q, k, head_windows(window, k), scale, softcap, sink_logits, least)


def head_windows(window: int | Sequence[int], k: Tensor) -> Tensor:
    """The window of each key head of k [B, KV, N, D] as a tensor [KV] int32 on its device, at most N.

    It is filled number by number: a copy from the host waits for the device, which the recording of a CUDA graph
    refuses.
    """
    kv_heads, n = k.shape[1:3]
    windows = [window] * kv_heads if isinstance(window, int) else window
    found = torch.empty(kv_heads, dtype=torch.int32, device=k.device)
    for head, tokens in enumerate(windows):
        found[head].fill_(min(tokens, n))
    return found
