"""Perplexity and divergence, against the same numbers from the model's own logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from lolcats.evaluation import Variant, as_segments, measure, perplexity
from lolcats.evaluation.perplexity import position_buckets

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]


def token_losses(model: Any, segments: Tensor) -> Tensor:
    """Negative log-likelihood of tokens 1 .. L - 1: [S, L - 1]."""
    with torch.no_grad():
        log_p = model(segments).logits[:, :-1].double().log_softmax(-1)
    return -log_p.gather(-1, segments[:, 1:, None]).squeeze(-1)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("last", [None, 1, 11, 23])
@pytest.mark.parametrize("chunk", [3, 2048])
def test_perplexity_is_the_naive_one(
    make_student: Students,
    tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    last: int | None,
    chunk: int,
) -> None:
    monkeypatch.setattr(perplexity, "HEAD_CHUNK", chunk)
    student, segments = make_student(window=5), tokens(5, 24)
    got = measure({"x": Variant(student)}, segments, last=last, batch_size=batch_size)["x"]
    losses = token_losses(student, segments)[:, -(last or 23) :]
    assert got.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert got.tokens == losses.numel()
    assert got.kl is None


def test_divergence_is_the_naive_one(teacher: LlamaForCausalLM, make_student: Students, tokens: Tokens) -> None:
    student, segments = make_student(window=5), tokens(3, 24)
    variants = {"student": Variant(student), "teacher": Variant(teacher)}
    got = measure(variants, segments, teacher=Variant(teacher), last=9, batch_size=2)
    with torch.no_grad():
        log_t, log_s = (m(segments).logits[:, -10:-1].double().log_softmax(-1) for m in (teacher, student))
    kl = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    assert got["student"].kl == pytest.approx(float(kl), rel=1e-4)
    assert got["student"].kl > 0.01  # type: ignore[operator]
    assert got["teacher"].kl == pytest.approx(0, abs=1e-7)


def test_a_teacher_among_the_variants_is_run_once(make_student: Students, tokens: Tokens) -> None:
    student, segments = make_student(window=5), tokens(3, 24)
    variant, runs = Variant(student), []
    student.model.register_forward_hook(lambda *_: runs.append(1))
    measure({"teacher": variant}, segments, batch_size=3)
    alone, once = len(runs), measure({"teacher": variant}, segments, teacher=variant, batch_size=3)["teacher"]
    assert len(runs) == 2 * alone and once.kl == 0
    twice = measure({"teacher": Variant(student)}, segments, teacher=variant, batch_size=3)["teacher"]
    assert len(runs) == 3 * alone + 1 and (once.loss, once.kl) == (twice.loss, twice.kl)


def test_buckets_of_position(make_student: Students, tokens: Tokens) -> None:
    student, segments = make_student(window=5), tokens(2, 200)
    got = measure({"x": Variant(student)}, segments, last=10)["x"]
    losses = token_losses(student, segments)
    expected = {"1-64": losses[:, :63], "64-128": losses[:, 63:127], "128-200": losses[:, 127:]}
    assert got.by_position == {k: pytest.approx(math.exp(v.mean()), rel=1e-5) for k, v in expected.items()}


@pytest.mark.parametrize("length", [2, 3, 63, 64, 65, 128, 129, 1024])
def test_buckets_cover_every_predicted_token_once(length: int) -> None:
    covered = [i for start, end in position_buckets(length) for i in range(start, end)]
    assert covered == list(range(1, length))


def test_buckets_end_at_edges_and_at_the_context(make_teacher: Callable[..., LlamaForCausalLM], tokens: Tokens) -> None:
    assert position_buckets(200, [100, 64, 1, 0, 200, 999]) == [(1, 64), (64, 100), (100, 128), (128, 200)]
    teacher = make_teacher(max_position_embeddings=90)
    got = measure({"x": Variant(teacher)}, tokens(1, 100), edges=[20])["x"]
    assert list(got.by_position) == ["1-20", "20-64", "64-90", "90-100"] and got.context == 90


def test_modes_are_entered_for_each_pass_and_left(make_student: Students, tokens: Tokens) -> None:
    entered: list[str] = []

    class Mode:
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *_: Any) -> None:
            entered.append("out")

    steps: list[tuple[int, int]] = []
    measure(
        {"x": Variant(make_student(window=5), Mode)}, tokens(5, 8), batch_size=2, progress=lambda *a: steps.append(a)
    )
    assert entered == ["in", "out"] * 6  # for the hidden states and for the logits of three batches
    assert steps == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(("length", "last"), [(8, 8), (8, 0), (8, 100), (1, None)])
def test_what_cannot_be_counted_is_refused(
    make_student: Students, tokens: Tokens, length: int, last: int | None
) -> None:
    with pytest.raises(ValueError, match=f"got {length} tokens"):
        measure({"x": Variant(make_student(window=5))}, tokens(2, length), last=last)


def test_segments() -> None:
    assert as_segments(list(range(11)), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(ValueError, match=r"at least 12 tokens .* got 11"):
        as_segments(torch.arange(11), 12)
