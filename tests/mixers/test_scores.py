"""Scores of keys: what the learned one is trained on, and what fading and chance do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats.errors import LolcatsError
from lolcats.mixers import Call, Sizes
from lolcats.mixers import scores as module
from lolcats.mixers.scores import RESOLUTION, SMALLEST, KeyScores, attention_given, chance

SIZES = Sizes(heads=4, kv_heads=2, head_dim=6, value_dim=4, hidden_size=10)
WINDOW = 5


def make_call(tokens: int = 40, seed: int = 0, **extra: Any) -> Call:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    q, k, v = random(4, tokens, 6), random(2, tokens, 6), random(2, tokens, 4)
    return Call(q * 2, k, v, random(tokens, 10), 6**-0.5, **extra)


def no_recall() -> Tensor:
    raise AssertionError("asked for the error of a far half")


def positions(call: Call) -> Tensor:
    return torch.arange(call.q.shape[2]).expand(2, -1)


@pytest.mark.parametrize("extra", [{}, {"softcap": 2.0, "sink_logits": torch.linspace(-1, 1, 4)}], ids=["plain", "odd"])
def test_attention_given_is_what_later_queries_give(extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sums over pairs; a block of queries is smaller than the text."""
    monkeypatch.setattr(module, "QUERY_BLOCK", 16)
    call = make_call(**extra)
    found = attention_given(call, WINDOW).exp() - SMALLEST
    for row, kv, j in ((0, 0, 0), (0, 1, 17), (1, 0, 33), (1, 1, 39)):
        largest, summed = 0.0, 0.0
        for head in (2 * kv, 2 * kv + 1):
            for i in range(j + WINDOW, 40):
                products = call.q[row, head, i] @ call.k[row, kv, : i + 1].T * call.scale
                if call.softcap is not None and call.sink_logits is not None:
                    products = call.softcap * torch.tanh(products / call.softcap)
                    products = torch.cat([products, call.sink_logits[head, None]])
                weight = float(products.softmax(-1)[j])
                largest, summed = max(largest, weight), summed + weight / 2
        assert found[row, kv, j].tolist() == pytest.approx([largest, summed], abs=1e-5)


def test_the_learned_score_learns_it() -> None:
    """From texts where the attention that a key is given can be seen in the key; the loss falls by half and more."""
    torch.manual_seed(0)
    scores = KeyScores(SIZES, "learned", mix=1.0, fade=None, recall_error=False)
    optimizer = torch.optim.AdamW(scores.parameters(), lr=1e-2)
    calls = [make_call(300, seed) for seed in range(4)]
    for call in calls:
        call.q.copy_(call.q.abs())
        call.k.copy_(call.k * call.k[..., :1].abs())
    losses = []
    for step in range(60):
        call = calls[step % 4]
        loss = scores.loss(call, call.k, WINDOW, no_recall)
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    with torch.no_grad():
        guessed = scores(calls[0], calls[0].k, positions(calls[0]), WINDOW, no_recall)[..., :44].flatten()
    given = attention_given(calls[0], WINDOW)[..., :44, 0].flatten()
    assert float(torch.corrcoef(torch.stack([guessed, given]))[0, 1]) > 0.5


def test_mix_goes_from_the_largest_to_the_sum() -> None:
    call = make_call()
    ends = [KeyScores(SIZES, "oracle", mix, None, False)(call, call.k, positions(call), WINDOW, no_recall)
            for mix in (1.0, 0.0, 0.25)]  # fmt: skip
    given = attention_given(call, WINDOW)
    wanted = [given[..., 0], given[..., 1], 0.25 * given[..., 0] + 0.75 * given[..., 1]]
    for score, want in zip(ends, wanted, strict=True):
        torch.testing.assert_close(score, want, rtol=0, atol=0.5 / RESOLUTION)
        assert torch.equal(score * RESOLUTION, (score * RESOLUTION).round()), "equal words must have equal scores"


def test_the_oracle_is_for_whole_texts() -> None:
    call = make_call()
    with pytest.raises(LolcatsError, match="choose another score to generate"):
        KeyScores(SIZES, "oracle", 1.0, None, False)(call, call.k, positions(call) + 3, WINDOW, no_recall)


def test_what_fades_at_once_is_recency() -> None:
    call = make_call()
    faded = KeyScores(SIZES, "random", 1.0, 1, False)(call, call.k, positions(call), WINDOW, no_recall)
    assert bool((faded[..., 2:] > faded[..., :-2]).all()), "chance is less than 1, which is what a token costs"


def test_chance_is_the_same_for_the_same_position() -> None:
    whole = chance(torch.arange(1000)[None], 3)
    assert torch.equal(whole[..., 500:], chance(torch.arange(500, 1000)[None], 3))
    assert float(whole.min()) >= 0 and float(whole.max()) < 1 and abs(float(whole.mean()) - 0.5) < 0.03
    assert float(torch.corrcoef(whole[0])[0, 1].abs()) < 0.1
