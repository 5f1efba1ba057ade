"""What must hold for every implementation: exact oracles, causality, segments, the row maximum."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as nnf
from helpers import CPU_IMPLEMENTATIONS, Case, Tensors, assert_same, assert_same_gradients, gradients, make, run
from torch import Tensor

all_implementations = pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)


def softmax_attention(tensors: Tensors) -> Tensor:
    return nnf.scaled_dot_product_attention(tensors.q, tensors.k, tensors.v, is_causal=True, enable_gqa=True)


WIDE = [("sliding", 70, 0), ("sliding", 300, 3), ("terraced", 35, 0), ("terraced", 70, 3), ("sliding", 1, 70)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "window", "sinks"), WIDE)
def test_wide_window_is_softmax_attention(kind: str, window: int, sinks: int) -> None:
    """Where window and sinks hold every key, g cancels and the features count for nothing, whatever they are."""
    for groups, feature_heads in ((1, "query"), (3, "kv")):
        case = Case(70, window, kind, sinks, decay=groups == 1, feature_heads=feature_heads, groups=groups)
        tensors = make(case)
        for factor, impl in itertools.product((-12.0, 0.0, 9.0), CPU_IMPLEMENTATIONS):
            factors = torch.full_like(tensors.window_factor, factor)
            huge = tensors._replace(phi_q=tensors.phi_q * 1e3, phi_k=tensors.phi_k * 1e3, window_factor=factors)
            assert_same(run(huge, case, impl).out, softmax_attention(tensors), f"{impl}, factor {factor}", 1e-12)


@all_implementations
def test_defect_01_no_key_is_counted_twice(impl: str) -> None:
    """A text that fits into the window is softmax attention alone: no gradient reaches the features."""
    for n, kind in itertools.product((2, 7, 16), ("sliding", "terraced")):
        case = Case(n, 16, kind, groups=2)
        tensors = make(case)
        out = run(tensors, case, impl).out
        assert_same(out, softmax_attention(tensors), f"{n} tokens, {kind}")
        found = gradients(out, tensors)
        assert found[3].abs().max() == 0
        assert found[4].abs().max() == 0
        assert found[2].abs().max() > 0


def linear_attention(tensors: Tensors, case: Case) -> Tensor:
    """Pure linear attention by a loop over tokens, in the dtype of the inputs."""
    heads = case.kv_heads * case.groups
    v = tensors.v.repeat_interleave(heads // tensors.v.shape[1], 1)
    phi_k = tensors.phi_k.repeat_interleave(heads // tensors.phi_k.shape[1], 1)
    kv = v.new_zeros(case.batch, heads, case.features, case.value_size)
    k_sum = v.new_zeros(case.batch, heads, case.features)
    outputs = []
    for i in range(case.n):
        if tensors.log_decay is not None:
            factor = tensors.log_decay[:, :, i].exp()
            kv, k_sum = kv * factor[..., None, None], k_sum * factor[..., None]
        kv = kv + phi_k[:, :, i, :, None] * v[:, :, i, None]
        k_sum = k_sum + phi_k[:, :, i]
        phi_q = tensors.phi_q[:, :, i]
        outputs.append(torch.einsum("bhf,bhfd->bhd", phi_q, kv) / (phi_q * k_sum).sum(-1, keepdim=True))
    return torch.stack(outputs, 2)


@pytest.mark.slow
@all_implementations
@pytest.mark.parametrize("decay", [False, True])
def test_no_window_is_linear_attention(decay: bool, impl: str) -> None:
    for feature_heads in ("query", "kv"):
        case = Case(150, 0, decay=decay, feature_heads=feature_heads, groups=2)
        tensors = make(case)
        want, got = linear_attention(tensors, case), run(tensors, case, impl).out
        assert_same(got, want)
        assert_same_gradients(got, want, tensors)


@pytest.mark.slow
def test_zero_decay_is_no_decay() -> None:
    for feature_heads, impl in itertools.product(("query", "kv"), CPU_IMPLEMENTATIONS):
        case = Case(80, 8, sinks=1, feature_heads=feature_heads, groups=2)
        tensors = make(case)
        zero = tensors._replace(log_decay=tensors.q.new_zeros(tensors.q.shape[:3]))
        assert_same(run(zero, case, impl).out, run(tensors, case, impl).out, impl)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "window"), [("sliding", 0), ("sliding", 9), ("terraced", 9)])
def test_the_future_changes_nothing(kind: str, window: int) -> None:
    case = Case(140, window, kind, sinks=2, decay=True, groups=2, kv_heads=1, batch=1)
    tensors = make(case)
    for cut, impl in itertools.product((1, 5, 64, 100), CPU_IMPLEMENTATIONS):
        other = make(case, seed=cut)
        later = {name: torch.cat([getattr(tensors, name)[:, :, :cut], getattr(other, name)[:, :, cut:]], 2)
                 for name in ("q", "k", "v", "phi_q", "phi_k", "log_decay")}  # fmt: skip
        changed = run(tensors._replace(**later), case, impl).out
        assert torch.equal(changed[:, :, :cut], run(tensors, case, impl).out[:, :, :cut]), f"{impl}, {cut} tokens"


@all_implementations
@pytest.mark.parametrize("kind", ["sliding", "terraced"])
def test_defect_02_appending_changes_no_earlier_output(kind: str, impl: str) -> None:
    """Blocks of the terraced window are anchored at the first token, not at the end."""
    case = Case(90, 8, kind, sinks=1, groups=2)
    tensors = make(case)
    full = run(tensors, case, impl).out
    for n in (1, 7, 8, 9, 63, 64, 65, 89):
        assert_same(run(tensors.tokens(0, n), case, impl).out, full[:, :, :n], f"{n} tokens")


def segmented(lengths: list[int], numbers: list[int]) -> Tensor:
    """[1, sum of lengths] segment ids."""
    return torch.cat([torch.full((m,), s) for m, s in zip(lengths, numbers, strict=True)])[None]


RUNS = {
    "increasing": ([40, 1, 100, 29], [0, 1, 2, 3]),
    "padding at the end": ([64, 64, 42], [3, 7, -1]),
    "padding between": ([30, 20, 120], [0, -1, 1]),
    "decreasing": ([50, 50, 70], [2, 1, 0]),
    "a number comes again": ([50, 50, 70], [0, 1, 0]),
    "again after padding": ([50, 50, 70], [0, -1, 0]),
}


@pytest.mark.slow
@all_implementations
@pytest.mark.parametrize("numbers", RUNS.values(), ids=RUNS.keys())
def test_segments_are_separate_calls(numbers: tuple[list[int], list[int]], impl: str) -> None:
    """Each run of equal numbers is a text of its own, with its own sinks and its own blocks."""
    lengths, ids = numbers
    for kind, window, sinks, decay in (("sliding", 7, 0, False), ("terraced", 7, 2, True), ("sliding", 0, 0, True)):
        case = Case(170, window, kind, sinks, decay, groups=2, kv_heads=1, batch=1)
        tensors = make(case)
        out = run(tensors, case, impl, segment_ids=segmented(lengths, ids)).out
        begin = 0
        for length, number in zip(lengths, ids, strict=True):
            piece = out[:, :, begin : begin + length]
            alone = run(tensors.tokens(begin, begin + length), case, impl).out
            assert_same(piece, alone if number >= 0 else torch.zeros_like(alone), f"{kind}, run at {begin}")
            begin += length


@all_implementations
def test_row_maximum_is_part_of_the_function(impl: str) -> None:
    """The linear sums are not rescaled by m, so steeper scores leave less to the softmax half."""
    q = torch.ones(1, 1, 3, 1, dtype=torch.float64)
    k = torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64).view(1, 1, 3, 1)
    v = torch.eye(3, dtype=torch.float64)[None, None]
    phi = torch.full((1, 1, 3, 1), 0.5, dtype=torch.float64)
    case = Case(3, window=2, kv_heads=1, batch=1, size=1)
    for factor in (0.0, 0.1, 1.0, 10.0):
        tensors = Tensors(q * factor, k, v, phi, phi, torch.zeros(1, dtype=torch.float64), None)
        weights = torch.tensor([0.25, 0.5, 0.5 * math.exp(-factor)], dtype=torch.float64)
        assert_same(run(tensors, case, impl).out[0, 0, 2], weights / weights.sum())
        shifted = tensors._replace(k=k + 100)  # one constant on all scores: m takes it away
        assert_same(run(shifted, case, impl).out, run(tensors, case, impl).out)


@all_implementations
def test_gradient_flows_through_the_row_maximum(impl: str) -> None:
    """For weights [linear 1/4, g, g exp(-x)] the share of the linear key rises by the gradient of exp(-x)."""
    q = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    k = torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64).view(1, 1, 3, 1)
    v = torch.eye(3, dtype=torch.float64)[None, None]
    phi = torch.full((1, 1, 3, 1), 0.5, dtype=torch.float64)
    tensors = Tensors(q.expand(1, 1, 3, 1), k, v, phi, phi, torch.zeros(1, dtype=torch.float64), None)
    out = run(tensors, Case(3, window=2, kv_heads=1, batch=1, size=1), impl).out
    (found,) = torch.autograd.grad(out[0, 0, 2, 0], q)
    total = 0.75 + 0.5 * math.exp(-0.7)
    assert found.item() == pytest.approx(0.25 * 0.5 * math.exp(-0.7) / total**2, rel=1e-12)
