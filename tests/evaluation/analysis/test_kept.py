"""Which pairs are kept, for how long, and what other scores would keep: against the definition, query by query."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from inside_cases import LAYERS, passes, seen_keys
from lolcats.evaluation.analysis.kept import kept_pairs, overlap, token_texts
from lolcats.evaluation.analysis.stream import LayerPass
from lolcats.mixers.blend import BlendMixer
from lolcats.mixers.scores import attention_given
from lolcats.ops.near import NearSpec
from lolcats.ops.near.reference import visible

pytestmark = pytest.mark.usefixtures("no_gradients")
TOKENS = 37
WORDS = [f"w{number}" for number in range(TOKENS)]
Make = Callable[..., PreTrainedModel]
Tokens = Callable[..., Tensor]
KEEPING = [name for name, settings in LAYERS.items() if "kept" in settings or "split" in settings]


def kept_by(scores: list[float], window: int, sinks: int, pairs: int) -> set[int]:
    """What a score keeps after the last token."""
    keys = visible(TOKENS - 1, NearSpec(window, sinks, pairs), scores)
    return {j for j in keys if j >= sinks and j <= TOKENS - 1 - window}


def share(one: set[int], other: set[int]) -> float | None:
    return len(one & other) / len(other) if other else None


@pytest.mark.parametrize("name", KEEPING)
def test_kept_pairs(name: str, make_student: Make, tokens: Tokens) -> None:
    every = list(passes(make_student(**LAYERS[name]), tokens(1, TOKENS)[0]).values())
    for seen in every if name == "heads" else every[1:2]:  # where layers differ, all of them
        found = {row.key_head: row for row in kept_pairs(seen, WORDS)}
        sizes = seen.inside().sizes
        assert list(found) == [head for head, size in enumerate(sizes) if size.pairs]
        for head, row in found.items():
            window, sinks, pairs = sizes[head]
            kept_at = [set(pair) for _, pair in seen_keys(seen, 3 * head)]
            assert row.positions == sorted(kept_at[-1]) and len(row.positions) == pairs
            assert row.tokens == [f"w{position}" for position in row.positions]
            keep = seen.inside().keep
            assert keep is not None
            scores = keep(None).score[0, head]
            assert row.scores == [float(scores[position]) for position in row.positions]
            assert row.candidates == TOKENS - window - sinks
            stays = [sum(j in kept for kept in kept_at) for j in range(TOKENS)]
            stayed = [stay for stay in stays if stay]
            assert row.stay_mean == pytest.approx(sum(stayed) / len(stayed))
            recent = kept_by([float(j) for j in range(TOKENS)], window, sinks, pairs)
            assert row.overlap_recency == pytest.approx(share(kept_at[-1], recent))
            assert row.overlap_oracle == pytest.approx(share(kept_at[-1], oracle_of(seen, head)))


def oracle_of(seen: LayerPass, head: int) -> set[int]:
    """What the attention of later queries would keep, by the layer's own rules."""
    mixer, inside = seen.student.mixer, seen.inside()
    assert isinstance(mixer, BlendMixer)
    score = mixer.score
    assert score is not None
    window, sinks, pairs = inside.sizes[head]
    largest, summed = attention_given(seen.call, window)[0, head].unbind(-1)
    marks = ((score.mix * largest + (1 - score.mix) * summed) * 1024).round() / 1024
    if score.fade is not None:
        marks = marks + torch.arange(TOKENS) / score.fade
    return kept_by(marks.tolist(), window, sinks, pairs)


def test_controls_overlap_with_themselves(make_student: Make, tokens: Tokens) -> None:
    ids = tokens(1, TOKENS)[0]
    for name, key in (("oracle", "overlap_oracle"), ("recency", "overlap_recency")):
        rows = [row for seen in passes(make_student(**LAYERS[name]), ids).values() for row in kept_pairs(seen, WORDS)]
        assert rows and all(getattr(row, key) == 1.0 for row in rows)
    random = [row for seen in passes(make_student(**LAYERS["random"]), ids).values() for row in kept_pairs(seen, WORDS)]
    assert all((row.overlap_recency or 0.0) < 1 for row in random)


def test_a_text_within_the_window(make_student: Make, tokens: Tokens) -> None:
    """Nothing has left it."""
    rows = kept_pairs(passes(make_student(**LAYERS["recency"]), tokens(1, 3)[0])[0], WORDS)
    assert [(row.positions, row.candidates, row.stay_mean, row.overlap_oracle) for row in rows] == [
        ([], 0, None, None)
    ] * 2


def test_no_pairs(make_student: Make, tokens: Tokens) -> None:
    for name in ("no pairs", "hybrid"):
        assert kept_pairs(passes(make_student(**LAYERS[name]), tokens(1, TOKENS)[0])[0], WORDS) == []


def test_overlap() -> None:
    one, other = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    assert (overlap(one, other), overlap(other, one), overlap(one, torch.zeros(3, dtype=torch.bool))) == (
        1.0,
        0.5,
        None,
    )


def test_texts_of_tokens(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = torch.tensor(tiny_tokenizer("the river runs")["input_ids"])
    assert "".join(token_texts(tiny_tokenizer, ids)) == "the river runs" and len(ids) > 1
