"""One text a row: the tokens of a call that is padded or packed, brought into rows that begin at their first token.

Operations that follow a text from its beginning, as the choice of kept pairs does, then know one kind of row only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lolcats.mixers.base import Call


class TextRows(NamedTuple):
    """Where the T texts of a batch of B rows are."""

    row: Tensor
    """[T] int64, the row that each text is in."""
    token: Tensor
    """[T, L] int64, its tokens there; anything beyond its end."""
    lengths: Tensor
    """[T] int64."""
    last: Tensor
    """[B] int64, the last text of each row."""

    def take(self, x: Tensor) -> Tensor:
        """x [B, h, N, d] -> [T, h, L, d]."""
        return x.transpose(1, 2)[self.row[:, None], self.token].transpose(1, 2)

    def longest(self) -> TextRows:
        """The longest text alone."""
        at = self.lengths.argmax()[None]
        token = self.token[at, : int(self.lengths[at])]
        return TextRows(self.row[at], token, self.lengths[at], torch.zeros_like(at))

    def put_back(self, y: Tensor, tokens: int) -> Tensor:
        """y [T, h, L, d] -> [B, h, N, d], 0 where no text is."""
        real = torch.arange(y.shape[2], device=y.device) < self.lengths[:, None]
        flat = (self.row[:, None] * tokens + self.token)[real]
        out = y.new_zeros(len(self.last) * tokens, y.shape[1], y.shape[3])
        out = out.index_copy(0, flat, y.transpose(1, 2)[real])
        return out.unflatten(0, (-1, tokens)).transpose(1, 2)


def find_texts(padding: Tensor | None, segments: Tensor | None) -> TextRows | None:
    """The texts of a call, None where each row is one from its first token to its last.

    Args:
        padding: [B, N] bool, False at padding; segments: [B, N], equal numbers for tokens of one text, negative at
            padding. As in `Call`; how many texts there are is read from the device.
    """
    if segments is not None:
        return _packed(segments)
    if padding is None:
        return None
    order = (~padding).long().argsort(dim=-1, stable=True)
    rows = torch.arange(len(padding), device=padding.device)
    return TextRows(rows, order, padding.sum(-1), rows)


def _packed(segments: Tensor) -> TextRows:
    changes = torch.ones_like(segments, dtype=torch.bool)
    changes[:, 1:] = segments[:, 1:] != segments[:, :-1]
    real = segments >= 0
    row, start = (changes & real).nonzero().unbind(1)
    number = (changes & real).flatten().cumsum(0) - 1  # of the text that each token is in
    lengths = torch.zeros(len(row), dtype=torch.int64, device=segments.device)
    lengths.index_add_(0, number[real.flatten()], torch.ones_like(number[real.flatten()]))
    token = start[:, None] + torch.arange(int(lengths.max()), device=segments.device)
    last = torch.bincount(row, minlength=len(segments)).cumsum(0) - 1
    return TextRows(row, token.clamp(max=segments.shape[1] - 1), lengths, last)


def one_row(call: Call, row: int) -> Call:
    """One row of texts without padding; the rotation is left out."""
    tensors = {name: getattr(call, name)[row : row + 1] for name in ("q", "k", "v", "hidden")}
    return replace(call, **tensors, padding=None, segments=None, rotation=None)


def one_text(call: Call, k: Tensor) -> tuple[Call, Tensor]:
    """A text of a batch, with its part of k [B, KV, N, D]: the first, of packed or padded ones the longest."""
    texts = find_texts(call.padding, call.segments)
    if texts is None:
        return one_row(call, 0), k[:1]
    one = texts.longest()
    return replace(rows_of(call, one), padding=None), one.take(k)


def rows_of(call: Call, texts: TextRows) -> Call:
    """The call with a text in each row and padding on the right only; the rotation is left out."""
    q, k, v = (texts.take(x) for x in (call.q, call.k, call.v))
    hidden = texts.take(call.hidden[:, None])[:, 0]
    real = torch.arange(q.shape[2], device=q.device) < texts.lengths[:, None]
    return replace(call, q=q, k=k, v=v, hidden=hidden, padding=real, segments=None, rotation=None)
