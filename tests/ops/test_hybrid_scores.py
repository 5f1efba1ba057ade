"""Capped scores and learned sinks: every implementation computes the formula, with every other option."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    CAP,
    CPU_IMPLEMENTATIONS,
    Case,
    Tensors,
    assert_same,
    assert_same_gradients,
    assert_same_state,
    gradients,
    make,
    run,
    scalar_truth,
)
from torch import Tensor

from lolcats.ops.hybrid import chunked
from lolcats.ops.hybrid.scores import row_max

OPTIONS = [{"softcap": CAP}, {"learned": True}, {"softcap": CAP, "learned": True}]
WINDOWS = [("sliding", 0), ("sliding", 1), ("sliding", 7), ("terraced", 7), ("sliding", 300)]
options = pytest.mark.parametrize("option", OPTIONS, ids=["cap", "learned", "both"])
windows = pytest.mark.parametrize(("kind", "window"), WINDOWS)


def check(case: Case, tensors: Tensors, **call: Tensor) -> None:
    """Outputs, gradients and final states of all implementations are the reference's."""
    stateful = "segment_ids" not in call
    want = run(tensors, case, "reference", return_state=stateful, **call)
    for impl in ("chunked", "recurrent"):
        got = run(tensors, case, impl, return_state=stateful, **call)
        assert_same(got.out, want.out, impl)
        assert_same_gradients(got.out, want.out, tensors)
        if got.state is not None and want.state is not None:
            assert_same_state(got.state, want.state, case)


@options
@pytest.mark.parametrize(("kind", "window"), [("sliding", 0), ("sliding", 3), ("terraced", 3)])
def test_scalar_truth(kind: str, window: int, option: dict[str, float]) -> None:
    for sinks, decay, groups in itertools.product((0, 2), (False, True), (1, 3)):
        case = Case(9, window, kind, sinks, decay, "kv", groups)._replace(**option)
        tensors = make(case)
        want = scalar_truth(tensors, case, row=1)
        for impl in CPU_IMPLEMENTATIONS:
            assert_same(run(tensors, case, impl).out[1], want, f"{impl} {case}")


@pytest.mark.slow
@options
@windows
def test_implementations_agree(kind: str, window: int, option: dict[str, float]) -> None:
    for sinks, decay, groups in ((0, False, 1), (2, True, 3), (2, False, 3)):
        case = Case(70, window, kind, sinks, decay, "kv", groups, kv_heads=1)._replace(**option)
        check(case, make(case))


@pytest.mark.slow
@options
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str, option: dict[str, float]) -> None:
    index, lengths = torch.arange(75), torch.tensor([75, 64, 3, 1])[:, None]
    mask = index >= 75 - lengths if side == "left" else index < lengths
    for kind in ("sliding", "terraced"):
        case = Case(75, 7, kind, 2, side == "left", groups=2, kv_heads=1, batch=4)._replace(**option)
        tensors = make(case)
        check(case, tensors, attention_mask=mask)
        out = run(tensors, case, "chunked", attention_mask=mask).out
        assert out[~mask[:, None].expand(out.shape[:3])].abs().max() == 0


@pytest.mark.slow
@options
def test_segments(option: dict[str, float]) -> None:
    ids = torch.tensor([0] * 30 + [-1] * 5 + [1] * 40)[None].expand(2, -1)
    for kind, sinks in (("sliding", 2), ("terraced", 0)):
        case = Case(75, 7, kind, sinks, True, groups=2)._replace(**option)
        check(case, make(case), segment_ids=ids)


@pytest.mark.slow
@options
def test_a_text_in_pieces(option: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_SPAN", 64)
    for kind in ("sliding", "terraced"):
        case = Case(150, 7, kind, sinks=2, groups=2)._replace(**option)
        tensors = make(case)
        want = run(tensors, case, "reference").out
        for first, second in itertools.product(CPU_IMPLEMENTATIONS, CPU_IMPLEMENTATIONS):
            head = run(tensors.tokens(0, 80), case, first, return_state=True)
            tail = run(tensors.tokens(80), case, second, initial_state=head.state)
            got = torch.cat([head.out, tail.out], 2)
            assert_same(got, want, f"{first}, then {second}")
            assert_same_gradients(got, want, tensors)


def softmax_attention(tensors: Tensors, case: Case) -> Tensor:
    """Softmax over capped scores and one more column without a value."""
    k, v = (x.repeat_interleave(case.groups, 1) for x in (tensors.k, tensors.v))
    scores = tensors.q @ k.mT * case.size**-0.5
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(torch.ones(case.n, case.n, dtype=torch.bool).triu(1), -torch.inf)
    if tensors.sink_logits is not None:
        scores = torch.cat([scores, tensors.sink_logits[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1)[..., : case.n] @ v


@pytest.mark.slow
@options
@pytest.mark.parametrize(("kind", "window", "sinks"), [("sliding", 70, 0), ("terraced", 35, 3), ("sliding", 1, 70)])
def test_wide_window_is_softmax_attention(kind: str, window: int, sinks: int, option: dict[str, float]) -> None:
    case = Case(70, window, kind, sinks, groups=3, feature_heads="kv")._replace(**option)
    tensors = make(case)
    want = softmax_attention(tensors, case)
    for factor, impl in itertools.product((-12.0, 0.0, 9.0), CPU_IMPLEMENTATIONS):
        changed = tensors._replace(window_factor=torch.full_like(tensors.window_factor, factor).requires_grad_())
        got = run(changed, case, impl).out
        assert_same(got, want, f"{impl}, factor {factor}", 1e-12)
        assert_same_gradients(got, want, changed)


def test_tied_scores_share_the_gradient_equally() -> None:
    """All scores are 0, those of sinks too: the maximum has as many gradients as there are columns."""
    for learned, window in itertools.product((False, True), (1, 5)):
        case = Case(20, window, sinks=2, groups=2, kv_heads=1, batch=1, learned=learned)
        tensors = make(case)
        tied = tensors._replace(q=torch.zeros_like(tensors.q).requires_grad_())
        if learned:
            tied = tied._replace(sink_logits=torch.zeros(2, dtype=torch.float64).requires_grad_())
        check(case, tied)


def test_row_max_is_amax_over_the_concatenation() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(0, 3, (50, width), generator=generator).double() for width in (4, 1, 3)]
    parts[0][0] = -torch.inf
    parts = [part.requires_grad_() for part in parts]
    weight = torch.randn(50, 1, generator=generator, dtype=torch.float64)
    want = torch.cat(parts, -1).amax(-1, keepdim=True)
    got = row_max(parts)
    assert torch.equal(got, want)
    pairs = zip(*(torch.autograd.grad((x * weight).sum(), parts) for x in (got, want)), strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-15) for a, b in pairs)
    assert row_max([torch.full((2, 3), -torch.inf), torch.full((2, 1), -torch.inf)]).tolist() == [[0.0], [0.0]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sliding", "terraced"])
def test_gradcheck(kind: str) -> None:
    case = Case(6, 2, kind, 1, True, "query", 2, 1, 1, 2, 1, 2, softcap=CAP, learned=True)
    for impl in CPU_IMPLEMENTATIONS:
        torch.autograd.gradcheck(
            lambda *x, name=impl: run(Tensors(*x), case, name).out,
            tuple(make(case).leaves()),
        )


@pytest.mark.slow
def test_large_scores_and_logits_do_not_overflow() -> None:
    """Scores or logits of +-1e4 in float32."""
    case = Case(100, 8, sinks=2, groups=2, learned=True)
    tensors = make(case, torch.float32)
    for name, factor in itertools.product(("q", "sink_logits"), (1e4, -1e4)):
        steep = tensors._replace(**{name: getattr(tensors, name) * factor})
        truth = run(steep.to(torch.float64), case, "reference").out
        for impl in CPU_IMPLEMENTATIONS:
            out = run(steep, case, impl).out
            torch.testing.assert_close(out.double(), truth, rtol=0, atol=1e-2, msg=f"{impl}, {name}")
            assert all(g.isfinite().all() for g in gradients(out, tensors)), impl
