"""The Triton kernels compute what the reference does, outputs and gradients; on a CPU by Triton's interpreter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers import Case, Tensors, make, run, state_of
from torch import Tensor

from lolcats.ops import HybridOutput, MapWeights, hybrid_attention

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, test_kernels_gpu.py takes their place")
TOLERANCE = 2e-5  # float32 against float64, relative to the largest number


def assert_near(got: Tensor, want: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    got, want = got.detach(), want.detach()
    scale = float(want.abs().max()) + 0.1
    worst = float((got.double() - want).abs().max())
    assert worst <= tolerance * scale, f"{what}: off by {worst:.2e}, the largest number is {scale:.2e}"


def weight_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def compare(got: Tensor, want: Tensor, inputs: list[Tensor], wanted: list[Tensor], names: list[str]) -> None:
    """Outputs, and gradients of one projection of them."""
    assert_near(got, want, "output")
    weight = weight_of(want)
    a = torch.autograd.grad((got * weight.float()).sum(), inputs, allow_unused=True)
    b = torch.autograd.grad((want * weight).sum(), wanted, allow_unused=True)
    for name, x, y in zip(names, a, b, strict=True):
        y = torch.zeros_like(wanted[names.index(name)]) if y is None else y
        x = torch.zeros_like(y) if x is None else x
        assert_near(x, y, f"gradient of {name}", 1e-4)


def check(case: Case, **options: Any) -> None:
    exact = make(case)
    tensors = exact.to(torch.float32).map(lambda x: x.requires_grad_())
    want, got = run(exact, case, "reference", **options).out, run(tensors, case, "triton", **options).out
    names = [name for name, x in zip(Tensors._fields, exact, strict=True) if x is not None]
    compare(got, want, tensors.leaves(), exact.leaves(), names)


def name_of(case: Case) -> str:
    return "-".join(str(x) for x in case)


WINDOWS = [("sliding", w) for w in (0, 1, 16, 64, 65, 256)] + [("terraced", w) for w in (1, 16, 64, 100, 128)]
LENGTHS = (1, 63, 64, 65, 200)


def grid() -> list[Case]:
    """Every window at every length; the other options change along the way."""
    cases = []
    for i, (n, (kind, window)) in enumerate(itertools.product(LENGTHS, WINDOWS)):
        sinks, heads = (0, 1, 4)[i % 3], ("query", "kv")[i // 2 % 2]
        cap, learned = (None, 0.7)[i // 5 % 2], i % 4 == 3
        cases.append(Case(n, window, kind, sinks, i % 2 == 0, heads, (1, 3)[i // 3 % 2], 1, 1, 5, 3, 6, cap, learned))
    return cases


def is_slow(case: Case) -> bool:
    return case.n not in (1, 65) or case.window != 16


CASES = [pytest.param(case, marks=[pytest.mark.slow] * is_slow(case), id=name_of(case)) for case in grid()]


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_the_reference(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(330, 64, "terraced", sinks=3, decay=True, batch=1, kv_heads=1, features=3),
        pytest.param(
            Case(520, 128, "terraced", sinks=70, batch=1, kv_heads=1, groups=2, features=4), marks=pytest.mark.slow
        ),
        pytest.param(Case(400, 192, "terraced", decay=True, batch=1, kv_heads=1, features=4), marks=pytest.mark.slow),
    ],
    ids=name_of,
)
def test_terraced_windows_of_whole_blocks(case: Case) -> None:
    """They reach a block less far than others; texts of more tiles than one have states."""
    check(case)


@pytest.mark.slow
def test_several_heads_and_rows() -> None:
    check(Case(70, 16, sinks=2, groups=2, kv_heads=2, batch=2, size=20, value_size=17, features=33))


def map_weights(kind: str, case: Case, dtype: torch.dtype) -> MapWeights:
    generator = torch.Generator().manual_seed(7)
    heads = case.kv_heads * case.groups
    key_heads = heads if case.feature_heads == "query" else case.kv_heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    width = case.features
    biases = (normal(heads, width), normal(key_heads, width)) if kind == "t2r" else (None, None)
    return MapWeights(
        kind, normal(heads, case.size, width), normal(key_heads, case.size, width), *biases, normal(heads)
    )


def mapped(tensors: Tensors, case: Case, maps: MapWeights, impl: str, **options: Any) -> HybridOutput:
    q, k, v, _, _, factor = tensors[:6]
    extra = {"log_decay": tensors.log_decay, "sink_logits": tensors.sink_logits}
    return hybrid_attention(q, k, v, maps, factor, case.spec, impl=impl, **extra, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hedgehog", "t2r"])
@pytest.mark.parametrize(
    "case",
    [
        Case(200, 64, kv_heads=1, batch=1, features=8),
        Case(140, 16, sinks=2, groups=2, feature_heads="kv", batch=1, features=5, softcap=0.7),
        Case(200, 64, "terraced", decay=True, groups=2, feature_heads="kv", kv_heads=1, batch=1, features=8),
        Case(140, 0, kv_heads=1, features=16),
    ],
    ids=name_of,
)
def test_maps_in_the_kernels(case: Case, kind: str) -> None:
    exact = make(case)
    tensors = exact.to(torch.float32).map(lambda x: x.requires_grad_())
    maps, low = map_weights(kind, case, torch.float64), map_weights(kind, case, torch.float32)
    want = mapped(exact, case, maps, "reference").out
    got = mapped(tensors, case, low, "triton").out
    names = ["q", "k", "v", "window_factor", *MapWeights._fields[1:]]
    leaves = [[*t[:3], t.window_factor, *m[1:]] for t, m in ((tensors, low), (exact, maps))]
    held = [i for i, x in enumerate(leaves[0]) if x is not None]
    inputs, wanted = ([side[i] for i in held] for side in leaves)
    compare(got, want, inputs, wanted, [names[i] for i in held])  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hedgehog", "t2r"])
def test_tiles_through_descriptors(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes of whole 16 bytes, which the copy engine takes; the tests above mostly use pointers."""
    pytest.importorskip("triton.tools.tensor_descriptor")
    from lolcats.ops.hybrid.kernels import attention

    plans = []
    make_plan = attention.make_plan
    monkeypatch.setattr(attention, "make_plan", lambda *a: plans.append(make_plan(*a)) or plans[-1])
    sizes: dict[str, Any] = {"groups": 2, "kv_heads": 1, "size": 16, "value_size": 24}
    test_maps_in_the_kernels(Case(200, 64, features=8, batch=1, **sizes), kind)
    test_maps_in_the_kernels(Case(140, 16, sinks=2, decay=True, batch=1, features=16, **sizes), kind)
    assert all(plan.tma for plan in plans)


@pytest.mark.slow
@pytest.mark.parametrize("padding", [(5, 0), (0, 70), (3, 4)])
def test_padding(padding: tuple[int, int]) -> None:
    case = Case(130, 16, sinks=2, groups=2, feature_heads="kv", kv_heads=1)
    exact = make(case)
    left, right = padding
    mask = torch.zeros(case.batch, case.n + left + right, dtype=torch.long)
    mask[:, left : left + case.n] = 1
    out = run(exact.to(torch.float32).padded(left, right), case, "triton", attention_mask=mask).out
    assert_near(out[:, :, left : left + case.n], run(exact, case, "reference").out, "output")
    assert (out * (1 - mask)[:, None, :, None]).abs().max() == 0


@pytest.mark.slow
def test_packed_documents() -> None:
    case = Case(210, 16, sinks=2, decay=True, groups=2, kv_heads=1)
    segments = torch.zeros(case.batch, case.n, dtype=torch.long)
    segments[0, 40:], segments[0, 180:], segments[1, 100:], segments[1, 101:] = 1, -1, 5, 0
    check(case, segment_ids=segments)


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "fold"), [(1, 1), (20, 1), (64, 1), (139, 1), (23, 5), (64, 5)])
@pytest.mark.parametrize("with_maps", [False, True], ids=["features", "maps"])
def test_a_text_in_two_calls(cut: int, fold: int, with_maps: bool) -> None:
    case = Case(140, 16, sinks=2, groups=2, feature_heads="kv", kv_heads=1, decay=not with_maps, fold=fold)
    exact = make(case)
    tensors = exact.to(torch.float32)
    maps, low = map_weights("hedgehog", case, torch.float64), map_weights("hedgehog", case, torch.float32)

    def call(part: Tensors, **options: Any) -> HybridOutput:
        if with_maps:
            return mapped(part, case, low, "triton", return_state=True, **options)
        return run(part, case, "triton", return_state=True, **options)

    with torch.no_grad():
        first = call(tensors.tokens(0, cut))
        second = call(tensors.tokens(cut), initial_state=first.state)
        want = mapped(exact, case, maps, "reference") if with_maps else run(exact, case, "reference")
        assert_near(torch.cat([first.out, second.out], 2), want.out, "output")
        if not with_maps:
            state = state_of(exact, case, "reference")
            assert second.state is not None
            assert_near(second.state.linear.kv, state.linear.kv, "kv")
            assert_near(second.state.linear.k_sum, state.linear.k_sum, "k_sum")
            assert torch.equal(second.state.length, state.length)
            assert_near(second.state.window.k, state.window.k, "window.k")


@pytest.mark.slow
def test_every_number_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(2**30)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: poisoned(x.shape, dtype=x.dtype, device=x.device))
    check(Case(140, 16, sinks=2, groups=2, feature_heads="kv", kv_heads=1))
    check(Case(200, 64, decay=True, kv_heads=1, batch=1))


@pytest.mark.slow
def test_same_numbers_again_and_in_any_batch() -> None:
    case = Case(140, 64, sinks=1, groups=2, kv_heads=1, batch=3)
    tensors = make(case, torch.float32)
    out = run(tensors, case, "triton").out
    assert torch.equal(out, run(tensors, case, "triton").out)
    for row in range(3):
        assert torch.equal(out[row : row + 1], run(tensors.rows(row, row + 1), case, "triton").out)


@pytest.mark.slow
def test_later_tokens_change_nothing() -> None:
    case = Case(200, 64, kv_heads=1, batch=1)
    tensors = make(case, torch.float32)
    whole = run(tensors, case, "triton").out
    for n in (1, 64, 100, 129):
        assert_near(run(tensors.tokens(0, n), case, "triton").out, whole[:, :, :n].double(), f"first {n} tokens", 1e-6)


@pytest.mark.parametrize("features", [6, 300])
def test_what_the_kernels_refuse(features: int) -> None:
    case = Case(20, 4, features=features)
    tensors = make(case, torch.float64 if features == 6 else torch.float32)
    with pytest.raises(ValueError, match=r"float32$|float32;|sizes up to 128 in") as error:
        run(tensors, case, "triton")
    assert "impl 'triton' cannot run this call" in str(error.value) and "use impl 'auto'" in str(error.value)


def test_gradient_through_a_state_is_refused() -> None:
    case = Case(20, 4)
    with pytest.raises(ValueError, match="no gradient through a state"):
        run(make(case, torch.float32), case, "triton", return_state=True)


def test_auto_on_a_cpu_is_chunked() -> None:
    case = Case(70, 16)
    tensors = make(case, torch.float32)
    assert torch.equal(run(tensors, case, "auto").out, run(tensors, case, "chunked").out)


def test_maps_of_a_wrong_shape_are_refused() -> None:
    case = Case(20, 4)
    maps = map_weights("hedgehog", case, torch.float32)
    tensors = make(case, torch.float32)
    with pytest.raises(ValueError, match=r"expected maps\.k"):
        mapped(tensors, case, maps._replace(k=maps.k[:1]), "triton")
