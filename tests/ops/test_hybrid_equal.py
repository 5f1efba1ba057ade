"""All implementations compute one function: outputs and gradients, against a scalar truth and against each other."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import (
    CPU_IMPLEMENTATIONS,
    Case,
    assert_same,
    assert_same_gradients,
    assert_same_state,
    make,
    run,
    scalar_truth,
    state_of,
)

from lolcats.ops import hybrid_attention
from lolcats.ops.hybrid import chunked, scan

WINDOWS = [("sliding", w) for w in (0, 1, 16, 64, 65, 300)] + [("terraced", w) for w in (1, 16, 64, 65, 300)]


def varied(n: int, kind: str, window: int, index: int, **numbers: Any) -> Case:
    """A case whose other options change with `index`, so that a grid of cases meets all of them."""
    sinks, heads = (0, 1, 4)[index % 3], ("query", "kv")[index // 2 % 2]
    return Case(n, window, kind, sinks, index % 2 == 0, heads, (1, 3)[index // 3 % 2], batch=1, **numbers)


def grid(lengths: tuple[int, ...], windows: list[tuple[str, int]]) -> list[Case]:
    return [varied(n, *window, i) for i, (n, window) in enumerate(itertools.product(lengths, windows))]


def name_of(case: Case) -> str:
    decay = "-decay" if case.decay else ""
    return f"n{case.n}-{case.kind}{case.window}-s{case.sinks}{decay}-phi_{case.feature_heads}-g{case.groups}"


def check(case: Case, impl: str) -> None:
    """Output and gradients of `impl` are those of the reference."""
    tensors = make(case)
    want, got = run(tensors, case, "reference").out, run(tensors, case, impl).out
    assert_same(got, want, f"{impl} {name_of(case)}")
    assert_same_gradients(got, want, tensors)


EDGES = [("sliding", 0), ("sliding", 1), ("sliding", 64), ("sliding", 65), ("terraced", 64)]


@pytest.mark.parametrize("case", grid((65, 500), WINDOWS) + grid((1, 63, 64), EDGES), ids=name_of)
def test_chunked_is_the_reference(case: Case) -> None:
    check(case, "chunked")


@pytest.mark.parametrize("case", grid((500,), [("sliding", 0), ("sliding", 16), ("terraced", 16)]), ids=name_of)
def test_spans_of_a_long_text_are_one_text(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_SPAN", 130)
    check(case, "chunked")


@pytest.mark.parametrize("case", grid((65,), WINDOWS) + grid((1, 63, 64), [("sliding", 16)]), ids=name_of)
def test_recurrent_is_the_reference(case: Case) -> None:
    check(case, "recurrent")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sliding", "terraced"])
def test_recurrent_is_the_reference_on_a_long_text(kind: str) -> None:
    check(Case(500, 64, kind, sinks=4, decay=True, groups=3, kv_heads=1, batch=1), "recurrent")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "window", "index"), [("sliding", 64, 2), ("sliding", 300, 3), ("terraced", 65, 4)])
def test_chunked_is_the_reference_on_1000_tokens(kind: str, window: int, index: int) -> None:
    check(varied(1000, kind, window, index, kv_heads=1, size=2, value_size=2, features=2), "chunked")


MANY_CHUNKS = {
    "plain": {},
    "padding": {"attention_mask": torch.arange(500)[None] >= 3},
    "boundary after 380 tokens": {"segment_ids": (torch.arange(500)[None] >= 380).long()},
    "boundary between chunks": {"segment_ids": torch.arange(500)[None] // 64 // 3},
}


@pytest.mark.parametrize("options", MANY_CHUNKS.values(), ids=MANY_CHUNKS.keys())
@pytest.mark.parametrize("span", [chunked.CPU_SPAN, 320])
def test_chunked_carries_over_many_chunks(
    options: dict[str, torch.Tensor], span: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More chunks than one product of the scan handles, in one span of the text and in two."""
    monkeypatch.setattr(scan, "GROUP", 2)
    monkeypatch.setattr(chunked, "CPU_SPAN", span)
    for decay, feature_heads in ((False, "kv"), (True, "query")):
        case = Case(500, 5, "sliding", 1, decay, feature_heads, 2, 1, 1, size=1, value_size=1, features=1)
        tensors = make(case)
        want, got = (run(tensors, case, impl, **options).out for impl in ("reference", "chunked"))
        assert_same(got, want)
        assert_same_gradients(got, want, tensors)


@pytest.mark.parametrize("feature_heads", ["query", "kv"])
@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_options_combine(sinks: int, decay: bool, feature_heads: str) -> None:
    for kind, groups in (("sliding", 1), ("terraced", 1), ("sliding", 3), ("terraced", 3)):
        case = Case(70, 5, kind, sinks, decay, feature_heads, groups)
        check(case, "chunked")
        check(case._replace(n=21), "recurrent")


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize(("kind", "window"), [("sliding", 0), ("sliding", 3), ("terraced", 1), ("terraced", 3)])
def test_scalar_truth(kind: str, window: int, sinks: int) -> None:
    """The formula in 20 lines of scalar Python, which shares nothing with the package."""
    for decay, (groups, heads) in itertools.product((False, True), ((1, "kv"), (3, "query"), (3, "kv"))):
        case = Case(9, window, kind, sinks, decay, heads, groups)
        tensors = make(case)
        want = scalar_truth(tensors, case, row=1)
        for impl in CPU_IMPLEMENTATIONS:
            assert_same(run(tensors, case, impl).out[1], want, f"{impl} {name_of(case)}")


def test_scale_is_used() -> None:
    case = Case(40, 8)
    tensors = make(case)
    scaled = tensors._replace(q=tensors.q * 3)
    q, k, v, phi_q, phi_k, factor, *_ = tensors
    spec = case.spec._replace(scale=3 * case.size**-0.5)
    for impl in CPU_IMPLEMENTATIONS:
        out = hybrid_attention(q, k, v, (phi_q, phi_k), factor, spec, impl=impl).out
        assert_same(out, run(scaled, case, impl).out, impl)


def masks(side: str, n: int, lengths: list[int]) -> torch.Tensor:
    """[len(lengths), n] with 1 at real tokens."""
    index = torch.arange(n)
    return torch.stack([index >= n - m if side == "left" else index < m for m in lengths]).long()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("kind", "window"), [("sliding", 0), ("sliding", 7), ("terraced", 7)])
def test_padding_is_the_reference(kind: str, window: int, side: str) -> None:
    case = Case(75, window, kind, sinks=2 if window else 0, decay=side == "left", groups=2, kv_heads=1, batch=4)
    tensors, mask = make(case), masks(side, 75, [75, 64, 3, 1])
    want = run(tensors, case, "reference", attention_mask=mask, return_state=True)
    for impl in ("chunked", "recurrent"):
        got = run(tensors, case, impl, attention_mask=mask, return_state=True)
        assert_same(got.out, want.out, impl)
        assert_same_gradients(got.out, want.out, tensors)
        assert got.state is not None
        assert want.state is not None
        assert_same_state(got.state, want.state, case)


@pytest.mark.parametrize(("kind", "window"), WINDOWS[:4] + WINDOWS[7:9])
def test_segments_are_the_reference(kind: str, window: int) -> None:
    case = varied(200, kind, window, window + len(kind))._replace(batch=2)
    tensors = make(case)
    segments = torch.stack([torch.arange(200) // 67, torch.tensor([0] * 3 + [4] * 130 + [5] * 60 + [-1] * 7)])
    want, got = (run(tensors, case, impl, segment_ids=segments).out for impl in ("reference", "chunked"))
    assert_same(got, want)
    assert_same_gradients(got, want, tensors)


@pytest.mark.parametrize(("kind", "window"), [("sliding", 0), ("sliding", 20), ("terraced", 20), ("sliding", 300)])
def test_final_state_is_the_reference(kind: str, window: int) -> None:
    for index, n in enumerate((1, 20, 77)):
        case = varied(n, kind, window, index + window)
        tensors = make(case)
        want = state_of(tensors, case, "reference")
        for impl in ("chunked", "recurrent"):
            assert_same_state(state_of(tensors, case, impl), want, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", grid((64, 500), [("sliding", 64), ("terraced", 64)]), ids=name_of)
def test_compiled_is_the_reference(case: Case) -> None:
    tensors = make(case).map(lambda x: x.detach().cuda().requires_grad_())
    want, got = (run(tensors, case, impl).out for impl in ("reference", "compiled"))
    assert_same(got, want)
    assert_same_gradients(got, want, tensors)
