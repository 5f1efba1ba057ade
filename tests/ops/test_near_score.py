"""The score of a text's keys by a kernel is that in torch; on a CPU interpreted."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lolcats.mixers import Call, Sizes
from lolcats.mixers.rotation import Layout, Rotation, layouts
from lolcats.mixers.scores import RESOLUTION, KeyScores
from lolcats.ops.near.prepare import score_keys, score_refusal

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
HALF = Layout("half")


class Case(NamedTuple):
    """Sizes of a text, or of several."""

    batch: int = 1
    kv_heads: int = 1
    tokens: int = 37
    size: int = 16
    value_size: int = 16
    layout: Layout | None = HALF
    angles: int = 16
    """P."""
    fade: int | None = 700
    dtype: torch.dtype = torch.float32


def make(case: Case) -> tuple[Call, KeyScores]:
    """Random numbers, laid out as by a layer; the first two channels of keys are large."""
    generator = torch.Generator().manual_seed(case.tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(case.batch, case.tokens, *shape, generator=generator)

    k, v = (random(case.kv_heads, n).to(DEVICE, case.dtype).transpose(1, 2) for n in (case.size, case.value_size))
    k[..., :2] *= 20
    rotation = None
    if case.layout is not None:
        turns = random(case.angles)
        rotation = Rotation((turns.cos() * 1.1).to(DEVICE), (turns.sin() * 1.1).to(DEVICE), case.layout)
    call = Call(k, k, v, (random(48) + 0.5).to(DEVICE, case.dtype), 1.0, rotation=rotation)
    torch.manual_seed(1)
    sizes = Sizes(case.kv_heads, case.kv_heads, case.size, case.value_size, 48)
    return call, KeyScores(sizes, "learned", 0.3, case.fade, False).to(DEVICE)


@torch.no_grad()
def check(call: Call, scores: KeyScores) -> None:
    """Up to the last digit, where what is rounded lies on an edge."""
    k = call.k if call.rotation is None else call.rotation.undo(call.k)
    position = torch.arange(call.k.shape[2], device=DEVICE).expand(call.k.shape[0], -1)
    fresh = scores.by_kernel(call, call.rotation is None, "triton")
    assert fresh is not None
    got, want = scores.faded(fresh, position), scores(call, k, position, 1, lambda: k)
    assert got.dtype == want.dtype and got.shape == want.shape
    apart = (got - want).abs() * RESOLUTION
    # The interpreter cuts off the digits that bfloat16 does not hold, instead of rounding.
    cut_off = DEVICE == "cpu" and call.k.dtype == torch.bfloat16
    assert float(apart.max()) <= (8 if cut_off else 1.01)
    assert cut_off or float((apart > 0.01).float().mean()) < 0.1


CASES = [
    Case(),
    Case(2, 3, 70, 64, 32, angles=64),
    Case(1, 2, 33, 128, 128, angles=128, dtype=torch.bfloat16),
    Case(3, 1, 1, 64, 64, angles=32, fade=None, dtype=torch.float16),
    Case(2, 2, 32, layout=None),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_score_in_torch(case: Case) -> None:
    check(*make(case))


@pytest.mark.parametrize(("layout", "angles"), [(x, n) for n in (4, 8) for x in layouts(n, 16)], ids=str)
def test_every_way_to_rotate(layout: Layout, angles: int) -> None:
    """All texts may have one rotation."""
    call, scores = make(Case(3, tokens=5, layout=layout, angles=angles))
    check(call, scores)
    assert call.rotation is not None
    check(replace(call, rotation=call.rotation._replace(cos=call.rotation.cos[:1], sin=call.rotation.sin[:1])), scores)


@torch.no_grad()
def test_a_token_has_its_score_in_every_text() -> None:
    """Bit by bit, wherever it stands, and however many there are."""
    call, scores = make(Case(2, 2, 50, layout=None))
    whole = scores.by_kernel(call, True, "triton")
    part = replace(call, k=call.k[1:, :, 19:], v=call.v[1:, :, 19:], hidden=call.hidden[1:, 19:])
    told = scores.told(call, True)
    assert whole is not None and told is not None
    assert torch.equal(score_keys(part.k, part.v, told._replace(hidden=part.hidden)), whole[1:, :, 19:])


def test_in_training_too() -> None:
    """What a kernel does not see of a graph is nothing: a choice has no gradient."""
    call, scores = make(Case())
    want = scores.by_kernel(call, False, "triton")
    asked = replace(call, **{n: getattr(call, n).clone().requires_grad_() for n in ("q", "k", "v", "hidden")})
    with torch.enable_grad():
        got = scores.by_kernel(asked, False, "triton")
    assert got is not None and want is not None and torch.equal(got, want) and not got.requires_grad


def test_refused() -> None:
    call, scores = make(Case())
    told = scores.told(call, False)
    assert told is not None
    cases: list[tuple[tuple[Tensor, Tensor], str]] = [
        ((call.k[..., :8], call.v), "reads a key and a value, 24 numbers; got 32"),
        ((call.k[..., :12], call.v), "powers of 2; got D 12, Dv 16"),
        ((call.k.double(), call.v), "takes bfloat16, float16 and float32"),
        ((call.k.clone().requires_grad_(), call.v), "no gradients"),
    ]
    for (k, v), message in cases:
        assert message in str(score_refusal(k, v, told))
    inputs = [
        (call.hidden[:, 1:], r"takes a layer's input \(1, 37, 48\) on .*; got \(1, 36, 48\)"),
        (call.hidden.clone().requires_grad_(), "no gradients to a layer's input"),
        (call.hidden.double(), "input of float32 or less"),
    ]
    for hidden, message in inputs:
        assert re.search(message, str(score_refusal(call.k, call.v, told._replace(hidden=hidden))))
    small, few = make(Case(size=8, angles=8))
    told = few.told(small, False)
    assert told is not None and "at least 16; got D 8, Dv 16" in str(score_refusal(small.k, small.v, told))
    assert few.by_kernel(small, False, "triton") is None and scores.by_kernel(call, False, "chunked") is None
    assert (scores.by_kernel(call, False, "auto") is None) == (DEVICE == "cpu")
