"""The teacher's attention in two parts: on the keys that a query of the layer sees exactly, and on all others.

Let V(i) be sinks, window and kept pairs of query i, and A the teacher's weights. A softmax splits exactly:

    y_i = (1 - m_i) near_i + m_i far_i,    m_i = sum of A_ij,    m_i far_i = sum of A_ij v_j,    j <= i not in V(i)

A learned sink belongs to the near part. So a layer of the same form can learn its share m and its far half apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from lolcats.mixers.base import Call, Sizes
from lolcats.mixers.near_heads import HeadGroup, kept_until_of, windows_of
from lolcats.mixers.scores import Window
from lolcats.mixers.softmax import attention_blocks
from lolcats.mixers.texts import TextRows
from lolcats.ops.devices import without_autocast

QUERY_BLOCK = 256
"""Queries whose attention is in memory at once."""


class FarAttention(NamedTuple):
    """What the teacher gives to the keys that are not near, float32."""

    mass: Tensor
    """m [B, H, N], 0 where all keys are near."""
    output: Tensor
    """m times the far output, [B, H, N, Dv]."""

    def put_back(self, texts: TextRows, tokens: int) -> FarAttention:
        """Of the rows that the texts were in."""
        mass = texts.put_back(self.mass[..., None], tokens)[..., 0]
        return FarAttention(mass, texts.put_back(self.output, tokens))


class Parts(NamedTuple):
    """The far part of the teacher and of a layer, for losses that compare them."""

    teacher: FarAttention
    share: Tensor
    """[B, H, N], the logit of the layer's share."""
    far: Tensor
    """[B, H, N, Dv], the output of its far half."""

    def direction_error(self) -> Tensor:
        """Squared error [B, N] of the far half's output times m^2, mean over heads and channels.

        That is what the far half adds to the error of the layer's output where its share is right.
        """
        difference = self.teacher.mass[..., None] * self.far.float() - self.teacher.output
        return difference.square().mean((1, 3))

    def share_error(self) -> Tensor:
        """Divergence [B, N] of the layer's share from m, mean over heads: cross-entropy less the least there can be."""
        mass = self.teacher.mass
        least = torch.special.entr(mass) + torch.special.entr(1 - mass)
        cross = nnf.binary_cross_entropy_with_logits(self.share.float(), mass, reduction="none")
        return (cross - least).mean(1)


class Share(nn.Linear):
    """The logit of the far half's share: a number for each query head, of the layer's input."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes.hidden_size, sizes.heads, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, -1.0)

    def forward(self, input: Tensor) -> Tensor:
        """[B, H, N] of the layer's input [B, N, d_model], float32 (float64 for a float64 layer)."""
        with without_autocast(input.device.type):
            return super().forward(input.to(self.weight.dtype)).transpose(1, 2)

    def join(self, near: Tensor, far: Tensor, input: Tensor) -> Tensor:
        """(1 - share) near + share far, [B, H, N, Dv] in the dtype of near."""
        share = self(input).sigmoid()[..., None]
        return torch.lerp(near.to(share.dtype), far.to(share.dtype), share).to(near.dtype)

    def match(self, mass: Tensor, window: Window, sinks: int) -> None:
        """Give each head the mean of `mass` [B, H, N] over the queries that have far keys, if there are any."""
        begin = (
            torch.as_tensor(window, device=mass.device).expand(1 if isinstance(window, int) else len(window)) + sinks
        )
        begin = begin.repeat_interleave(mass.shape[1] // len(begin))
        has_far = torch.arange(mass.shape[2], device=mass.device) >= begin[:, None]
        mean = (mass * has_far).sum((0, 2)) / (len(mass) * has_far.sum(-1)).clamp_min(1)
        self.bias.copy_(torch.where(has_far.any(-1), mean.clamp(1e-4, 1 - 1e-4).logit(), self.bias))


@torch.no_grad()
def far_attention(call: Call, near: tuple[HeadGroup, ...], until: Tensor | None = None) -> FarAttention:
    """The far part of the teacher's attention; O(N^2) time, memory of `QUERY_BLOCK` queries.

    Args:
        call: a text in each row, padding on the right only, where the numbers mean nothing.
        near: window and sinks of the key heads.
        until: [B, KV, N] int64, the query from which on each pair is not kept (`kept_until`); None without kept pairs.
    """
    groups, keys = call.q.shape[1] // call.k.shape[1], torch.arange(call.q.shape[2], device=call.q.device)
    v = call.v.float().repeat_interleave(groups, 1)
    window, sinks = torch.as_tensor(windows_of(near), device=call.q.device), near[0].spec.sinks
    window = window if window.ndim == 0 else window[:, None, None]
    masses, outputs = [], []
    with without_autocast(call.q.device.type):
        for begin, weights in attention_blocks(call, QUERY_BLOCK, torch.float32):
            end = weights.shape[-1]
            query = keys[begin:end, None]
            far = (keys[:end] >= sinks) & (query - keys[:end] >= window)
            if until is not None:
                far = far & (query >= until[:, :, None, :end])
            if far.ndim > 2:
                far = far.repeat_interleave(groups, -3)
            weights = weights * far
            masses.append(weights.sum(-1))
            outputs.append(weights @ v[:, :, :end])
    return FarAttention(torch.cat(masses, 2).clamp(max=1.0), torch.cat(outputs, 2))


def far_beyond_kept(
    rows: Call, near: tuple[HeadGroup, ...], score: Tensor | None, texts: TextRows | None, tokens: int
) -> FarAttention:
    """The teacher's attention to what a layer that keeps pairs by their score does not see.

    Args:
        rows: a text in each row.
        near: the key heads of the layer.
        score: [B, KV, N], or None without kept pairs.
        texts: where the texts were, if not in rows of `tokens` tokens; the result is put back there.
    """
    until = None if score is None else kept_until_of(near, rows, score, None if texts is None else texts.lengths)
    found = far_attention(rows, near, until)
    return found if texts is None else found.put_back(texts, tokens)
