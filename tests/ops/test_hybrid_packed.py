"""`cu_seqlens`: each text of a packed row as if it were alone, outputs, states in and out, gradients."""

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
    gradients,
    make,
    run,
    state_of,
)
from torch import Tensor

from lolcats.ops import HybridState
from lolcats.ops.hybrid import chunked

W = 8
LENGTHS = [1, W - 1, 0, W, W + 1, chunked.CHUNK + 1]
CUTS = torch.tensor([0, *itertools.accumulate(LENGTHS)])
CASES = [
    Case(int(CUTS[-1]), W, sinks=2, decay=True, groups=2, batch=1, learned=True),
    Case(int(CUTS[-1]), W, "terraced", sinks=1, feature_heads="kv", groups=2, batch=1, softcap=0.7),
    Case(int(CUTS[-1]), 0, feature_heads="kv", kv_heads=1, batch=1),
    Case(int(CUTS[-1]), W, sinks=1, decay=True, kv_heads=1, batch=1, fold=3),
]
NAMES = ["sliding", "terraced", "linear", "waiting"]
cases = pytest.mark.parametrize("case", CASES, ids=NAMES)
implementations = pytest.mark.parametrize("impl", CPU_IMPLEMENTATIONS)


def states_before(case: Case) -> HybridState:
    """A state for each text, of texts of 0 to 2 W + 1 tokens."""
    before = case._replace(n=2 * W + 1, batch=len(LENGTHS))
    held = torch.tensor([0, 2 * W + 1, 3, W, W + 1, 2 * W])[:, None]
    tensors = make(before, seed=3).map(lambda x: x.detach())
    return state_of(tensors, before, "reference", attention_mask=torch.arange(before.n) < held)


def each_alone(case: Case, state: HybridState | None) -> list[Any]:
    """The reference on each text that has tokens, and the inputs that are shared by all."""
    tensors = make(case)
    results = []
    for text, (begin, end) in enumerate(itertools.pairwise(CUTS.tolist())):
        before = None if state is None else state.map(lambda t, i=text: t[i : i + 1])
        part = tensors.tokens(begin, end)
        results.append(run(part, case, "reference", initial_state=before, return_state=True) if end > begin else None)
    return [results, tensors]


def output_of(results: list[Any]) -> Tensor:
    return torch.cat([r.out for r in results if r is not None], 2)


@cases
@implementations
@pytest.mark.parametrize("starts", [False, True], ids=["from nothing", "from states"])
def test_packed_is_separate(case: Case, impl: str, starts: bool) -> None:
    before = states_before(case) if starts else None
    results, tensors = each_alone(case, before)
    got = run(tensors, case, impl, cu_seqlens=CUTS, initial_state=before, return_state=True)
    assert_same(got.out, output_of(results))
    assert_same_gradients(got.out, output_of(results), tensors)
    assert got.state is not None
    for text, result in enumerate(results):
        state = got.state.map(lambda t, i=text: t[i : i + 1])
        if result is not None:
            assert_same_state(state, result.state, case)
        elif before is not None:  # a text without tokens leaves its state as it was
            assert_same_state(state, before.map(lambda t, i=text: t[i : i + 1]), case)
        else:
            assert state.length.tolist() == [0] and state.linear.kv.abs().max() == 0


@cases
@implementations
def test_without_states_the_row_stays_packed(case: Case, impl: str) -> None:
    results, tensors = each_alone(case, None)
    got = run(tensors, case, impl, cu_seqlens=CUTS.int())
    assert got.state is None
    assert_same(got.out, output_of(results))
    assert_same_gradients(got.out, output_of(results), tensors)


@cases
@implementations
def test_gradients_flow_through_the_states(case: Case, impl: str) -> None:
    """Two calls, the second from the states of the first: gradients of the first call's tokens come from both."""
    found = []
    for name in ("reference", impl):
        tensors, more = make(case), make(case, seed=1)
        first = run(tensors, case, name, cu_seqlens=CUTS, return_state=True)
        out = run(more, case, name, cu_seqlens=CUTS, initial_state=first.state).out
        found.append(gradients(out, tensors))
    for a, b in zip(*found, strict=True):
        assert_same(b, a, tolerance=1e-9)
    assert max(float(g.abs().max()) for g in found[0]) > 0


def test_the_packed_row_goes_on_text_by_text() -> None:
    """The states of a packed call are the initial state of a batch of rows, and the other way round."""
    case = CASES[0]
    tensors = make(case)
    rows = make(case._replace(n=3, batch=len(LENGTHS)), seed=2)._replace(**tensors.per_head())
    state = run(tensors, case, "chunked", cu_seqlens=CUTS, return_state=True).state
    assert state is not None
    want = run(rows, case, "reference", initial_state=state, return_state=True)
    packed = rows.map(lambda x: x if x.ndim == 1 else x.transpose(0, 1).flatten(1, 2)[None])
    cuts = torch.arange(len(LENGTHS) + 1) * 3
    got = run(packed, case, "chunked", cu_seqlens=cuts, initial_state=state, return_state=True)
    assert_same(got.out, want.out.transpose(0, 1).flatten(1, 2)[None])
    assert got.state is not None and want.state is not None
    assert_same_state(got.state, want.state, case)


@torch.no_grad()
@pytest.mark.parametrize(("index", "starts"), [(0, False), (1, True), (3, True)])
def test_the_kernels_on_packed_texts(index: int, starts: bool) -> None:
    pytest.importorskip("triton")
    case = CASES[index]._replace(kv_heads=1)
    before = states_before(case) if starts else None
    low = None if before is None else before.map(lambda t: t.float() if t.is_floating_point() else t)
    results, tensors = each_alone(case, before)
    got = run(tensors.to(torch.float32), case, "triton", cu_seqlens=CUTS, initial_state=low, return_state=True)
    assert got.state is not None
    torch.testing.assert_close(got.out.double(), output_of(results), rtol=2e-5, atol=2e-5)
    for text, result in enumerate(results):
        if result is not None:
            kv = got.state.linear.kv[text : text + 1].double()
            torch.testing.assert_close(kv, result.state.linear.kv, rtol=2e-5, atol=2e-5)
            assert int(got.state.length[text]) == int(result.state.length)


BAD = {
    "floats": ({"cu_seqlens": torch.tensor([0.0, 5.0])}, "one dimension, int32 or int64"),
    "two dimensions": ({"cu_seqlens": torch.tensor([[0, 5]])}, "one dimension, int32 or int64"),
    "no text": ({"cu_seqlens": torch.tensor([0])}, "at least one text"),
    "not from 0": ({"cu_seqlens": torch.tensor([1, 5])}, r"rise from 0 to the number of tokens, 5; got \[1, 5\]"),
    "not to the end": ({"cu_seqlens": torch.tensor([0, 4])}, r"number of tokens, 5; got \[0, 4\]"),
    "falling": ({"cu_seqlens": torch.tensor([0, 4, 3, 5])}, r"rise from 0"),
    "with a mask": (
        {"cu_seqlens": torch.tensor([0, 5]), "attention_mask": torch.ones(1, 5)},
        "cu_seqlens without attention_mask or segment_ids",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD.keys())
def test_refused(options: dict[str, Any], message: str) -> None:
    case = Case(5, 2, batch=1)
    with pytest.raises(ValueError, match=message):
        run(make(case), case, "chunked", **options)


def test_refused_batches() -> None:
    case = Case(5, 2, batch=2)
    cuts = torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match=r"a batch of 1; got 2"):
        run(make(case), case, "chunked", cu_seqlens=cuts)
    one = case._replace(batch=1)
    state = state_of(make(one), one, "chunked")
    with pytest.raises(ValueError, match=r"a state for a batch of 2; got \(1,\)"):
        run(make(one), one, "chunked", cu_seqlens=cuts, initial_state=state)


def test_an_implementation_that_cannot_run_is_not_replaced() -> None:
    """The kernels take no float64, and give no gradient through states, of packed texts neither."""
    pytest.importorskip("triton")
    case = Case(5, 2, batch=1)
    cuts = torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match=r"impl 'triton' cannot run this call: it takes bfloat16, float16 and float32"):
        run(make(case), case, "triton", cu_seqlens=cuts)
    with pytest.raises(ValueError, match=r"impl 'triton' cannot run this call: it gives no gradient through a state"):
        run(make(case, torch.float32), case, "triton", cu_seqlens=cuts, return_state=True)
