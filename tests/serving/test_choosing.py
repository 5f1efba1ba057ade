"""The draw of a token against the distribution that it stands for."""

from __future__ import annotations

import pytest
import torch
from transformers import TopPLogitsWarper

from lolcats.serving.choosing import NOT_A_NUMBER, Draw, choose


@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.01])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_evenly_spread_draws_give_the_distribution(temperature: float, top_p: float) -> None:
    """Of temperature and top-p as transformers has them: each token as often as its share."""
    logits = torch.randn(1, 23, generator=torch.Generator().manual_seed(0)) * 2
    scores = (
        TopPLogitsWarper(top_p)(torch.LongTensor(1, 1), logits / temperature) if top_p < 1 else logits / temperature
    )
    count = 4000
    draws = [Draw(temperature, top_p, (number + 0.5) / count) for number in range(count)]
    counts = torch.bincount(torch.tensor(choose(logits.expand(count, -1), draws)), minlength=23)
    assert (counts / count - scores.softmax(-1)[0]).abs().max() <= 2 / count


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_the_last_draw_takes_a_token_that_may_be_taken(top_p: float) -> None:
    """Where a number is rounded to one, too."""
    logits = torch.tensor([[1.0, -torch.inf, 0.0, -torch.inf]])
    for number in (0.0, 1 - 1e-9, 1.0):
        assert choose(logits, [Draw(1.0, top_p, number)])[0] in ((0, 2) if top_p == 1 else (0,))


def test_rows_do_not_see_each_other() -> None:
    """Greedy, drawn and broken rows beside each other."""
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    logits[3, 7] = torch.nan
    draws = [Draw(), Draw(1.0, 1.0, 0.4), Draw(0.7, 0.8, 0.9), Draw(1.0, 0.5, 0.2), Draw(2.0, 1.0, 0.1)]
    together = choose(logits, draws)
    assert together == [choose(logits[row : row + 1], draws[row : row + 1])[0] for row in range(5)]
    assert together[0] == int(logits[0].argmax()) and together[3] == NOT_A_NUMBER
