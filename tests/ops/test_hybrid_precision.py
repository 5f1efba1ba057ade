"""What must hold for every implementation: gradients by differences, low precision, extremes, memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as nnf
from helpers import CAP, CPU_IMPLEMENTATIONS, Case, Tensors, assert_same, gradients, make, run
from torch import Tensor

all_implementations = pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)


TINY = [
    Case(6, 2, "sliding", 1, True, "query", 2, 1, 1, size=2, value_size=1, features=2),
    Case(6, 2, "terraced", 0, False, "kv", 2, 1, 1, size=2, value_size=2, features=2),
    Case(5, 0, "sliding", 0, True, "query", 1, 1, 1, size=1, value_size=2, features=2),
]


def as_function(case: Case, impl: str) -> Callable[..., Tensor]:
    return lambda *leaves: run(Tensors(*leaves, *[None] * (7 - len(leaves))), case, impl).out


@pytest.mark.slow
@pytest.mark.parametrize("case", TINY, ids=["sliding", "terraced", "linear"])
def test_gradcheck(case: Case) -> None:
    for impl in CPU_IMPLEMENTATIONS:
        torch.autograd.gradcheck(as_function(case, impl), tuple(make(case).leaves()))


def test_gradcheck_over_chunks() -> None:
    """Long enough for a state that is carried from chunk to chunk."""
    case = Case(140, 3, "sliding", 1, True, "query", 1, 1, 1, size=1, value_size=1, features=1)
    torch.autograd.gradcheck(as_function(case, "chunked"), tuple(make(case).leaves()), fast_mode=True)


def bfloat16_truth(tensors: Tensors, window: int) -> Tensor:
    """Sliding window and plain sums in float64 (one head a head, no sinks, no decay)."""
    q, k, v, phi_q, phi_k, factor = (x.double() for x in tensors[:6])
    n = q.shape[2]
    kv = torch.einsum("bhnf,bhnd->bhnfd", phi_k, v).cumsum(2)
    kv, k_sum = (nnf.pad(x.transpose(2, -1), (window, 0))[..., :n].transpose(2, -1) for x in (kv, phi_k.cumsum(2)))
    keys, values = (nnf.pad(x, (0, 0, window - 1, 0)).unfold(2, window, 1) for x in (k, v))  # [B, H, N, d, w]
    scores = torch.einsum("bhnd,bhndw->bhnw", q, keys) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.arange(n)[:, None] + torch.arange(window) < window - 1, -torch.inf)
    weights = factor.sigmoid()[:, None, None] * (scores - scores.amax(-1, keepdim=True)).exp()
    numerator = torch.einsum("bhnw,bhndw->bhnd", weights, values) + torch.einsum("bhnf,bhnfd->bhnd", phi_q, kv)
    return numerator / (weights.sum(-1) + (phi_q * k_sum).sum(-1))[..., None]


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "n"), [("chunked", 6000), ("recurrent", 2000), ("reference", 2000)])
def test_defect_05_bfloat16_sums_do_not_stall(impl: str, n: int) -> None:
    """On a long text the error is that of rounding the result to bfloat16; sums kept in bfloat16 are far off."""
    case = Case(n, 16, kv_heads=1, batch=1, size=4, value_size=4, features=4)
    tensors = make(case).to(torch.bfloat16)
    tensors = tensors._replace(v=tensors.v + 1)  # a mean to find: its sums grow with the text
    truth = bfloat16_truth(tensors, case.window)
    with torch.no_grad():
        result = run(tensors, case, impl, return_state=True)
    assert result.state is not None
    error = (result.out.double() - truth).abs().max()
    rounding = (truth.bfloat16().double() - truth).abs().max()
    assert error <= 1.05 * rounding + 1e-5
    k_sum = tensors.phi_k[:, :, : n - case.window].double().sum(2)
    torch.testing.assert_close(result.state.linear.k_sum.double(), k_sum, rtol=1e-5, atol=0)

    stalled = torch.zeros(4, dtype=torch.bfloat16)
    for row in tensors.phi_k[0, 0, : n - case.window]:
        stalled = stalled + row
    assert (stalled.double() < 0.5 * k_sum[0, 0]).all(), "the text is too short to tell"


LOW_PRECISION = {
    "terraced": Case(200, 16, "terraced", sinks=2, decay=True, groups=2),
    "capped": Case(200, 16, sinks=2, groups=2, softcap=CAP, learned=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", LOW_PRECISION.values(), ids=LOW_PRECISION.keys())
def test_low_precision_is_as_good_as_the_inputs(case: Case, dtype: torch.dtype) -> None:
    """The error against float64 is at most that of rounding the result, and of float32 sums."""
    tensors = make(case).to(dtype)
    truth = run(tensors.to(torch.float64), case, "reference").out
    rounding = (truth.to(dtype).double() - truth).abs().max()
    for impl in CPU_IMPLEMENTATIONS:
        got = run(tensors, case, impl).out
        assert got.dtype == dtype
        assert (got.double() - truth).abs().max() <= 1.05 * rounding + 1e-5, impl


def test_autocast_does_not_lower_the_sums() -> None:
    case = Case(100, 8, sinks=1)
    tensors = make(case).to(torch.float32)
    for impl in CPU_IMPLEMENTATIONS:
        with torch.autocast("cpu", torch.bfloat16):
            inside = run(tensors, case, impl).out
        assert torch.equal(inside, run(tensors, case, impl).out), impl


def test_large_scores_do_not_overflow() -> None:
    """Scores of +-1e4 in float32: the maximum is taken away before the exponential."""
    case = Case(100, 8, sinks=2, groups=2)
    tensors = make(case, torch.float32)
    steep = tensors._replace(q=tensors.q * 1e4)
    for impl in CPU_IMPLEMENTATIONS:
        out = run(steep, case, impl).out
        assert out.isfinite().all(), impl
        assert all(g.isfinite().all() for g in gradients(out, tensors)), impl
        assert out.detach().abs().max() > 0.1, impl  # a NaN turned into zeros would pass as finite


@all_implementations
def test_strong_decay_stays_finite(impl: str) -> None:
    """exp(-60) a token: sums over thousands of tokens underflow, they do not become NaN."""
    case = Case(200, 8, sinks=2, decay=True)
    tensors = make(case, torch.float32)
    assert tensors.log_decay is not None
    strong = tensors._replace(log_decay=tensors.log_decay * 200)
    out = run(strong, case, impl).out
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(out, tensors))
    truth = run(strong.to(torch.float64), case, "reference").out
    torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@all_implementations
def test_a_fully_padded_row_is_zero(impl: str) -> None:
    for kind, window, sinks in (("sliding", 0, 0), ("sliding", 8, 2), ("terraced", 8, 2)):
        case = Case(70, window, kind, sinks, decay=True)
        tensors = make(case)
        mask = torch.stack([torch.zeros(70), torch.ones(70)])
        result = run(tensors, case, impl, attention_mask=mask, return_state=True)
        assert result.state is not None
        assert result.out[0].abs().max() == 0
        assert all(g[0].abs().max() == 0 for g in gradients(result.out, tensors) if g.ndim > 1)
        assert result.state.length.tolist() == [0, 70]
        assert result.state.linear.kv[0].abs().max() == 0
        assert_same(result.out[1:], run(tensors.rows(1, 2), case, impl).out)


@all_implementations
def test_no_visible_key_gives_zeros(impl: str) -> None:
    """Features of zero and no window: an empty sum, not 0 / 0; and gradients that are finite."""
    case = Case(70, 0)
    tensors = make(case)
    nothing = tensors._replace(phi_k=tensors.phi_k * (torch.arange(70) >= 40)[:, None])
    out = run(nothing, case, impl).out
    assert out[:, :, :40].abs().max() == 0
    assert out[:, :, 40:].isfinite().all()
    assert all(g.isfinite().all() for g in gradients(out, tensors))


@all_implementations
def test_nan_is_not_hidden(impl: str) -> None:
    """A NaN in a query is seen in its output: a run that broke must not look like one that gives zeros."""
    case = Case(40, 8, sinks=1, batch=1)
    tensors = make(case)
    q = tensors.q.detach().clone()
    q[:, :, 20] = torch.nan
    out = run(tensors._replace(q=q), case, impl).out
    assert out[:, :, 20].isnan().all()
    assert out[:, :, :20].isfinite().all()


def saved_for_backward(n: int, impl: str, case: Case) -> tuple[int, int]:
    """Elements of the largest tensor, and of all tensors, that one forward pass keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    tensors = make(case._replace(n=n), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = run(tensors, case._replace(n=n), impl).out
    assert out.requires_grad
    return max(sizes.values()), sum(sizes.values())


LONG = {
    "sliding": Case(0, 64, sinks=4, feature_heads="kv", groups=3, kv_heads=1, batch=1),
    "terraced-decay": Case(0, 64, "terraced", sinks=4, decay=True, groups=3, kv_heads=1, batch=1),
}


@pytest.mark.parametrize("case", LONG.values(), ids=LONG.keys())
def test_defect_13_training_memory_is_linear(case: Case) -> None:
    """What chunked attention keeps for the backward pass doubles with the length; the reference's quadruples."""
    largest, total = zip(*(saved_for_backward(n, "chunked", case) for n in (1024, 2048, 4096)), strict=True)
    assert largest[1] <= 2.02 * largest[0]
    assert largest[2] <= 2.02 * largest[1]
    assert total[2] <= 2.1 * total[1]
    quadratic, _ = zip(*(saved_for_backward(n, "reference", case) for n in (256, 512)), strict=True)
    assert quadratic[1] >= 3.9 * quadratic[0], "the measure does not see quadratic memory"
