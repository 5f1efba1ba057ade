"""The adapter of flash-linear-attention: against stand-ins of its functions everywhere, with the real ones on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
from typing import Any

import pytest
import torch
from recurrence_cases import DECAYING, FAMILIES, Tensors, assert_same, gradients, make, run, run_with_state
from torch import Tensor

from lolcats.ops import recurrence
from lolcats.ops.recurrence import api
from lolcats.ops.recurrence import fla as adapter

CALLED = {
    "linear": "chunk_simple_gla",
    "mamba2": "chunk_simple_gla",
    "gla": "chunk_gla",
    "delta": "chunk_delta_rule",
    "gated_delta": "chunk_kda",
    "kda": "chunk_kda",
}
GATES = {"chunk_simple_gla": ["g"], "chunk_gla": ["g"], "chunk_delta_rule": ["beta"], "chunk_kda": ["g", "beta"]}
OPTIONS = ["scale", "initial_state", "output_final_state", "cu_seqlens"]
HAS_FLA = importlib.util.find_spec("fla") is not None


class StandIns:
    """Functions called as flash-linear-attention's are, with its layout and its demands, made of the reference."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.refuses = False

    def __call__(self, module: str, name: str) -> Any:
        if module == "fla.utils":
            return {"IS_NVIDIA_HOPPER": True, "TRITON_ABOVE_3_4_0": True, "TRITON_ABOVE_3_7_1": not self.refuses}[name]
        assert module == f"fla.ops.{name.removeprefix('chunk_')}"
        self.called.append(name)

        def call(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor | None, **options: Any) -> tuple[Tensor, Any]:
            assert q.shape == k.shape and v.shape[:3] == q.shape[:3]
            assert not q.shape[3] % 2 and not v.shape[3] % 2 and q.dtype == k.dtype == v.dtype
            given: dict[str, Any] = dict(zip(GATES[name], gates, strict=True))
            per = {"chunk_gla": q.shape, "chunk_kda": q.shape, "chunk_simple_gla": q.shape[:3]}
            assert given.get("g") is None or given["g"].shape == per[name]
            assert given.get("g") is None or bool((given["g"] >= -100).all())
            assert given.get("beta") is None or given["beta"].shape == q.shape[:3]
            assert given.get("g", v) is None or given.get("g", v).dtype != torch.bfloat16
            return _by_text(q, k, v, given.get("g"), given.get("beta"), **options)

        return call


def _by_text(
    *tensors: Tensor | None,
    scale: float,
    output_final_state: bool,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    q, k, v, log_decay, beta = (None if x is None else x.transpose(1, 2) for x in tensors)
    assert q is not None and k is not None and v is not None
    before = None
    if initial_state is not None:
        assert initial_state.dtype == torch.float32
        before = api.RecurrentState(initial_state.double(), None, torch.zeros(len(q), dtype=torch.long))
    cuts = [0, q.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
    assert cuts[0] == 0 and cuts == sorted(set(cuts)) and cuts[-1] == q.shape[2]
    outputs, last = [], None
    for begin, end in itertools.pairwise(cuts):
        text = Tensors(q, k, v, log_decay, beta).tokens(begin, end)
        out, last = recurrence(
            *text[:3], log_decay=text.log_decay, beta=text.beta, scale=scale, initial_state=before, impl="reference",
            return_state=True,
        )  # fmt: skip
        outputs.append(out.transpose(1, 2))
    assert last is not None
    return torch.cat(outputs, 1), last.kv if output_final_state else None


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    found = StandIns()
    monkeypatch.setattr(adapter, "_imported", found)
    monkeypatch.setattr(api, "fla_installed", lambda: True)
    monkeypatch.setattr(api, "fla_refusal", lambda inputs: None)
    return found


def exact(tensors: Tensors) -> Tensors:
    """Numbers of float32, in which gates are handed on."""
    return tensors.map(lambda x: x.detach().float().double().requires_grad_())


KINDS = [(name, norm) for name, (_, beta) in FAMILIES.items() for norm in (False, True) if not (beta and norm)]


@pytest.mark.parametrize("state_heads", [2, 4])
@pytest.mark.parametrize(("family", "normalised"), KINDS)
def test_the_adapter(family: str, normalised: bool, state_heads: int, stand_ins: StandIns) -> None:
    """Heads, filled sizes, padding, a column of ones, states in and out, gradients."""
    tensors = exact(make(family, 20, state_heads=state_heads))
    leaves = [x for x in tensors if x is not None]
    mask = torch.arange(20) >= torch.tensor([[3], [0]])
    results = []
    for impl in ("fla", "reference"):
        head, state = run_with_state(tensors.tokens(0, 12), impl, attention_mask=mask[:, :12], normalised=normalised,
                                     state_dtype=torch.float32)  # fmt: skip
        tail, state = run_with_state(tensors.tokens(12), impl, initial_state=state, normalised=normalised)
        assert state.length.tolist() == [17, 20]
        sums = [x for x in state[:2] if x is not None]
        results.append([head, tail, *sums, *gradients([head, tail], leaves)])
    for got, want in zip(*results, strict=True):
        assert_same(got, want, 1e-6)  # outputs and states of float32
    assert stand_ins.called == [CALLED[family]] * 2


@pytest.mark.parametrize(("family", "normalised"), KINDS)
def test_packed_texts_are_cut(family: str, normalised: bool, stand_ins: StandIns) -> None:
    tensors = exact(make(family, 12))
    ids = torch.tensor([[0] * 5 + [1] * 7, [-1] * 2 + [3] * 4 + [-1] * 2 + [3] * 4])
    got, want = (run(tensors, impl, segment_ids=ids, normalised=normalised).out for impl in ("fla", "reference"))
    assert_same(got, want, 1e-6)
    assert stand_ins.called == [CALLED[family]]


@pytest.mark.parametrize("family", DECAYING)
def test_a_full_decay_is_a_number(family: str, stand_ins: StandIns) -> None:
    tensors = exact(make(family, 12))
    assert tensors.log_decay is not None
    log_decay = tensors.log_decay.detach().clone()
    log_decay[:, :, 4] = -torch.inf
    tensors = tensors._replace(log_decay=log_decay)
    assert_same(run(tensors, "fla").out, run(tensors, "reference").out, 1e-6)
    assert stand_ins.called == [CALLED[family]]


def test_kernels_that_refuse_gradients_are_not_asked_for_them(stand_ins: StandIns) -> None:
    """A decay per head is then one per channel, the same for all."""
    tensors = exact(make("mamba2", 12))
    stand_ins.refuses = True
    got, want = (run(tensors, impl).out for impl in ("fla", "reference"))
    leaves = [x for x in tensors if x is not None]
    for a, b in zip(gradients([got], leaves), gradients([want], leaves), strict=True):
        assert_same(a, b, 1e-6)
    with torch.no_grad():
        run(tensors, "fla")
    assert stand_ins.called == ["chunk_gla", "chunk_simple_gla"]


@pytest.mark.skipif(not HAS_FLA, reason="needs flash-linear-attention")
@pytest.mark.parametrize("name", GATES)
def test_its_functions_take_what_the_adapter_gives(name: str) -> None:
    function = getattr(importlib.import_module(f"fla.ops.{name.removeprefix('chunk_')}"), name)
    names = list(inspect.signature(function).parameters)
    assert names[: 3 + len(GATES[name])] == ["q", "k", "v", *GATES[name]]
    assert set(OPTIONS) <= set(names)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_FLA, reason="needs flash-linear-attention")
@pytest.mark.parametrize("state_heads", [2, 4])
@pytest.mark.parametrize(("family", "normalised"), KINDS)
def test_on_a_gpu(family: str, normalised: bool, state_heads: int) -> None:
    """Outputs, states and gradients are within the rounding of bfloat16 operands; padded, packed, cut."""
    tensors = make(family, 150, state_heads=state_heads).map(lambda x: x.detach().bfloat16().cuda().requires_grad_())
    leaves = [x for x in tensors if x is not None]
    mask = torch.arange(100, device="cuda") >= torch.tensor([[30], [0]], device="cuda")
    ids = torch.arange(150, device="cuda").expand(2, -1) // 70
    results = []
    for impl in ("fla", "reference"):
        head, state = run_with_state(tensors.tokens(0, 100), impl, attention_mask=mask, normalised=normalised)
        tail, last = run_with_state(tensors.tokens(100), impl, initial_state=state, normalised=normalised)
        packed = run(tensors, impl, segment_ids=ids, normalised=normalised).out
        parts = [head, tail, packed]
        results.append([*parts, *(x for x in last[:2] if x is not None), *gradients(parts, leaves)])
    for got, want in zip(*results, strict=True):
        error = (got.double() - want.double()).norm() / want.double().norm()
        assert bool(got.isfinite().all()) and float(error) < 0.02
