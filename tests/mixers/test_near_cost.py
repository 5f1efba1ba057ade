"""The cost of a near half of another size is that of near attention of this size, straight from its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lolcats.mixers import Call
from lolcats.mixers.near_cost import GUESS_ERROR, GUESS_SEED, guessing, near_costs
from lolcats.mixers.scores import attention_given
from lolcats.mixers.softmax import capped_softmax
from lolcats.ops.near import NearSpec, near_attention

WINDOWS, PAIRS = (1, 3, 8, 40), (0, 1, 2, 5, 40)


@pytest.mark.parametrize(
    "extra", [{}, {"softcap": 1.5}, {"sink_logits": torch.tensor([0.3, -1.0, 0.5, 0.1])}], ids=["plain", "cap", "sinks"]
)
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("guess", [False, True], ids=["oracle", "guess"])
@torch.no_grad()
def test_cost_is_the_squared_product_of_gradient_and_error(extra: dict[str, Any], sinks: int, guess: bool) -> None:
    """Pairs that are guessed are those of the highest scores with errors, the same ones for all windows."""
    generator = torch.Generator().manual_seed(0)
    q, gradient = (torch.randn(1, 4, 37, size, generator=generator) for size in (6, 5))
    k, v = (torch.randn(1, 2, 37, size, generator=generator) for size in (6, 5))
    call = Call(2 * q, k, v, torch.zeros(1, 37, 3), 0.4, **extra)
    found = near_costs(call, gradient, WINDOWS, PAIRS, sinks, mix=0.7, guess=guessing() if guess else None)
    assert found.shape == (2, 4, 5) and found.dtype == torch.float64
    errors = GUESS_ERROR * torch.randn(2, 37, generator=torch.Generator().manual_seed(GUESS_SEED))
    exact = capped_softmax(call.q, k, v, None, 0.4, call.softcap, call.sink_logits)
    for a, window in enumerate(WINDOWS):
        largest, summed = attention_given(call, window).unbind(-1)
        for b, pairs in enumerate(PAIRS):
            spec = NearSpec(window, sinks, pairs, 0.4, call.softcap)
            score = 0.7 * largest + 0.3 * summed + (errors if guess else 0) if pairs else None
            y = near_attention(call.q, k, v, spec, score=score, sink_logits=call.sink_logits).out
            expected = ((gradient * (y - exact)).sum(-1).square().mean(-1)).view(2, 2).sum(-1)
            torch.testing.assert_close(found[:, a, b].float(), expected, rtol=1e-4, atol=1e-6)
