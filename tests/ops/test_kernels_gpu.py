"""The Triton kernels on a GPU, at real sizes and in low precision, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Case, Tensors, make, run
from test_kernels import map_weights, mapped
from torch import Tensor

from lolcats.ops import MapWeights

pytestmark = pytest.mark.gpu
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}  # of one number, fp32: of a sum


def relative(got: Tensor, want: Tensor, terms: int = 1) -> float:
    """Error relative to the numbers, or to what rounds in them: sums of `terms` numbers of about 0.4."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / (want.norm() + 0.4 * (terms * want.numel()) ** 0.5))


def leaves_of(tensors: Tensors, maps: MapWeights) -> list[Tensor]:
    extra = [x for x in (tensors.log_decay, tensors.sink_logits) if x is not None]
    return [*tensors[:3], tensors.window_factor, *extra, *[x for x in maps[1:] if x is not None]]


def outcome(tensors: Tensors, maps: MapWeights, case: Case, impl: str, **options: Any) -> list[Tensor]:
    """Output and gradients."""
    out = mapped(tensors, case, maps, impl, **options).out
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
    return [out, *torch.autograd.grad((out.float() * weight).sum(), leaves_of(tensors, maps))]


def inputs(
    case: Case, kind: str, dtype: torch.dtype, like: tuple[Tensors, MapWeights] | None = None
) -> tuple[Tensors, MapWeights]:
    """Inputs in `dtype` (parameters at least float32), equal to those of `like` where given."""
    tensors, maps = like or (make(case, torch.float32), map_weights(kind, case, torch.float32))
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def move(x: Tensor | None, to: torch.dtype) -> Tensor | None:
        return None if x is None else x.detach().cuda().to(to).requires_grad_()

    low = tensors.to(dtype).map(lambda x: x.cuda().requires_grad_())
    low = low._replace(**{name: move(getattr(tensors, name), wide) for name in tensors.per_head()})
    if tensors.log_decay is not None:
        low = low._replace(log_decay=move(tensors.log_decay, wide))
    scaled = maps._replace(q=maps.q / 4, k=maps.k / 4)
    return low, MapWeights(kind, *[move(x, wide) for x in scaled[1:]])  # type: ignore[arg-type]


def check(case: Case, kind: str, dtype: torch.dtype, **options: Any) -> None:
    low = inputs(case, kind, dtype)
    exact = inputs(case, kind, torch.float64, (low[0].map(lambda x: x.cpu()), map_weights(kind, case, torch.float32)))
    want = outcome(exact[0], exact[1], case, "reference", **options)
    got = outcome(low[0], low[1], case, "triton", **options)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):  # the output, then gradients, which round more often
        terms = case.batch * case.n if b.ndim == 1 else 1  # numbers a head are sums over all tokens
        error, allowed = relative(a, b, terms), (5 if index else 2) * ROUNDING[dtype]
        assert error <= allowed, f"result {index} of {case}: {error:.2e}, more than {allowed:.2e}"


SIZES = [(64, 64), (80, 40), (96, 96), (128, 64), (32, 32)]


@pytest.mark.parametrize("n", [1, 63, 64, 65, 500, 1000])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_lengths_and_sizes(n: int, size: tuple[int, int]) -> None:
    d, width = size
    check(
        Case(n, 64, sinks=n % 5, groups=3, kv_heads=1, size=d, value_size=d, features=width), "hedgehog", torch.bfloat16
    )


def test_four_thousand_tokens() -> None:
    case = Case(4096, 64, sinks=4, groups=2, kv_heads=1, batch=1, size=128, value_size=128, features=64)
    check(case, "hedgehog", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["hedgehog", "t2r"])
def test_types(dtype: torch.dtype, kind: str) -> None:
    check(Case(300, 64, groups=2, size=64, value_size=64, features=64), kind, dtype)


@pytest.mark.parametrize("window", [0, 16, 100, 256])
@pytest.mark.parametrize("kind", ["sliding", "terraced"])
def test_windows(window: int, kind: str) -> None:
    window = max(window, 1) if kind == "terraced" else window
    cap = 5.0 if window == 16 else None
    case = Case(700, window, kind, 2, window != 16, "kv", 2, 2, 1, 64, 64, 64, cap, window == 100)
    check(case, "hedgehog", torch.bfloat16)


def test_packed_documents() -> None:
    case = Case(700, 64, sinks=2, groups=2, size=64, value_size=64, features=64)
    segments = torch.zeros(case.batch, case.n, dtype=torch.long, device="cuda")
    segments[0, 40:], segments[0, 500:], segments[1, 100:] = 1, -1, 2
    check(case, "hedgehog", torch.bfloat16, segment_ids=segments)


@pytest.mark.parametrize("size", [(256, 256), (192, 128)], ids=str)
def test_large_heads(size: tuple[int, int]) -> None:
    dtype = torch.bfloat16
    case = Case(300, 64, sinks=2, groups=2, kv_heads=1, batch=1, size=size[0], value_size=size[1], features=256)
    tensors = make(case, torch.float32).map(lambda x: x.detach() / 4).map(lambda x: x.cuda().to(dtype))
    got = run(tensors, case, "triton").out
    assert relative(got, run(tensors.to(torch.float64), case, "reference").out) <= 2 * ROUNDING[dtype]


def test_same_numbers_again() -> None:
    case = Case(1000, 64, sinks=2, groups=3, size=64, value_size=64, features=64)
    low = inputs(case, "hedgehog", torch.bfloat16)
    first, second = (outcome(low[0], low[1], case, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
