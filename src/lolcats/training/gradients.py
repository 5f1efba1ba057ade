"""Gradients of several processes: added up in one exchange, and clipped, whether weights are whole or sharded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lolcats.models.sharded import is_shard
from lolcats.training.checkpoint import finite

BUCKET = 1 << 28
"""Numbers that are exchanged together, 1 GB: adapters take one exchange, all weights of a model several."""


def reduce_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Add up the gradients of all processes, in place.

    They travel in one float32 tensor, so that the number of parameters costs no waiting. Each number is the same sum
    as if it had travelled alone: for two processes to the last bit; for more, the order of its terms is what the
    exchange makes of its place in the tensor.

    Args:
        parameters: those that are trained, the same in all processes. Of sharded ones FSDP has added the gradients up.
    """
    if accelerator.num_processes == 1:
        return
    own = [p for p in parameters if not is_shard(p)]
    if not own:
        return
    # A parameter without a gradient here (an expert that no token chose) may have one elsewhere.
    flags = torch.tensor([p.grad is not None for p in own], device=accelerator.device).float()
    used = cast(Tensor, accelerator.reduce(flags, "sum")).tolist()
    bucket: list[nn.Parameter] = []
    for p in (p for p, count in zip(own, used, strict=True) if count):
        if bucket and sum(q.numel() for q in bucket) + p.numel() > BUCKET:
            _reduce_together(bucket, accelerator)
            bucket = []
        bucket.append(p)
    if bucket:
        _reduce_together(bucket, accelerator)


def _reduce_together(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().reshape(-1) for p in parameters])
    flat = cast(Tensor, accelerator.reduce(flat, "sum"))
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).to(p.dtype)


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their norm together is at most `limit`; the norm that they had."""
    sharded = [p for p in parameters if is_shard(p)]
    if not sharded:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    groups = sharded, [p for p in parameters if not is_shard(p)]
    norms = [_norm([p.grad for p in group if p.grad is not None]) for group in groups]
    norm = torch.stack(norms).norm()
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def first_not_finite(parameters: Mapping[str, nn.Parameter], accelerator: Accelerator, together: bool) -> str:
    """The name of the first parameter that holds NaN or infinity, "" if none does.

    Args:
        parameters: by name.
        together: all processes ask, and get one answer; else each looks at what it has.
    """
    bad = torch.tensor([not finite(p) for p in parameters.values()], device=accelerator.device).float()
    if together:
        bad = cast(Tensor, accelerator.reduce(bad, "sum"))
    return next((name for name, count in zip(parameters, bad.tolist(), strict=True) if count), "")


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """Of gradients that are all sharded or all whole."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if is_shard(norm) else norm  # type: ignore[attr-defined]
