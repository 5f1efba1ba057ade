"""The next token of each text in a batch, by its own temperature, top-p and draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NOT_A_NUMBER = -1
"""In the place of a token, where predictions are NaN or infinite."""


class Draw(NamedTuple):
    """How the token of a row is chosen; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    number: float = 0.0
    """From [0, 1), of the row's own generator."""


@torch.no_grad()
def choose(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """The tokens of the rows of logits [B, V]; a row's depends on nothing but its own logits and draw."""
    logits = logits.float()
    tokens = logits.argmax(-1)
    for cut in (False, True):  # a sort of the whole vocabulary only for those who ask for it
        rows = [row for row, draw in enumerate(draws) if draw.temperature > 0 and (draw.top_p < 1) == cut]
        if rows:
            chosen, where = [draws[row] for row in rows], torch.tensor(rows, device=logits.device)
            tokens[where] = _drawn(logits[where], chosen, cut)
    fine = logits.amax(-1).isfinite()
    return torch.where(fine, tokens, NOT_A_NUMBER).tolist()


def _drawn(logits: Tensor, draws: Sequence[Draw], cut: bool) -> Tensor:
    """The place at which the running sum of probabilities passes each row's number."""
    temperature, top_p, number = torch.tensor(draws, device=logits.device)[..., None].unbind(1)
    shares, order = (logits / temperature).softmax(-1), None
    if cut:
        shares, order = shares.sort(dim=-1, descending=True, stable=True)
        shares = shares.masked_fill(shares.cumsum(-1) - shares >= top_p, 0.0)
    passed = shares.cumsum(-1)
    place = (passed <= number * passed[:, -1:]).sum(-1, keepdim=True)
    last = shares.shape[1] - 1 - shares.flip(-1).ne(0).byte().argmax(-1, keepdim=True)  # where rounding went beyond
    place = torch.minimum(place, last)
    return (place if order is None else order.gather(-1, place))[:, 0]
