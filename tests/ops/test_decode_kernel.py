"""The kernel's step is the step in torch, outputs and states, also on a GPU; on a CPU by Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Case, Tensors, make, rows_apart
from test_kernels import assert_near, map_weights, name_of
from torch import Tensor

from lolcats.ops import HybridSpec, HybridState, MapWeights, hybrid_attention, hybrid_step
from lolcats.ops.hybrid.layout import Inputs, empty_state

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
CASES = [  # few programs, of which the interpreter runs ten a second; long enough for keys to leave where rows pause
    Case(26, 16, kv_heads=1, features=8),
    Case(16, 5, sinks=3, groups=3, feature_heads="kv", features=5, softcap=0.7, learned=True),
    Case(12, 5, decay=True, groups=2, feature_heads="kv", kv_heads=1, size=20, value_size=17, features=6),
    Case(8, 1, sinks=1, groups=2, batch=1, features=3),
    Case(20, 5, sinks=2, decay=True, groups=2, feature_heads="kv", kv_heads=1, features=6, learned=True, fold=4),
    Case(16, 3, sinks=1, groups=3, feature_heads="kv", kv_heads=1, features=5, softcap=0.7, fold=3),
    Case(14, 1, batch=1, kv_heads=1, features=3, size=20, value_size=17, fold=6),
    Case(20, 5, "terraced", sinks=3, groups=3, feature_heads="kv", kv_heads=1, features=5, learned=True),
    Case(16, 4, "terraced", decay=True, feature_heads="kv", groups=2, kv_heads=1, size=20, value_size=17, features=6),
    Case(6, 1, "terraced", batch=1, features=3),
]
WIDE = [
    Case(195, 70, decay=True, features=8, batch=1, kv_heads=1, fold=60),
    Case(303, 150, sinks=2, decay=True, features=8, batch=1, kv_heads=1),
    Case(203, 100, "terraced", sinks=2, decay=True, features=8, batch=1, kv_heads=1),
]


def start(case: Case, kind: str) -> tuple[Tensors, MapWeights, HybridState]:
    """Tokens in float32, weights of maps, and the state before the first token."""
    tensors = make(case, torch.float32).map(lambda x: x.detach().to(DEVICE))
    maps = map_weights(kind, case, torch.float32)
    maps = maps._replace(
        **{n: x.detach().to(DEVICE) for n, x in zip(maps._fields[1:], maps[1:], strict=True) if x is not None}
    )
    inputs = Inputs(*tensors[:3], maps.phi_q(tensors.q), maps.phi_k(tensors.k), *tensors[5:7], None, None, None)
    state = empty_state(inputs, case.spec)
    return tensors, maps, state._replace(window=state.window._replace(phi_k=None))


def step(
    tensors: Tensors, i: int, maps: MapWeights, state: HybridState, case: Case, impl: str, **options: Any
) -> tuple[Tensor, HybridState]:
    """Token i, by one implementation."""
    part = tensors.tokens(i, i + 1)
    extra = {"log_decay": part.log_decay, "sink_logits": part.sink_logits, "impl": impl, **options}
    return hybrid_step(part.q, part.k, part.v, maps, part.window_factor, state, case.spec, **extra)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hedgehog", "t2r"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
@torch.no_grad()
def test_steps(case: Case, kind: str) -> None:
    """Outputs and states; at some steps, in some rows, there is padding."""
    tensors, maps, plain = start(case, kind)
    fused = plain.map(lambda t: t.clone())
    addresses = [t.data_ptr() for t in fused.tensors()]
    for i in range(case.n):
        active = None
        if i % 2:  # as the model gives it: a column of a wider mask
            active = ((torch.arange(case.batch, device=DEVICE) + i) % 3)[:, None].repeat(1, 4)[:, -1]
        want, plain = step(tensors, i, maps, plain, case, "recurrent", active=active)
        got, fused = step(tensors, i, maps, fused, case, "triton", active=active, donate=True)
        assert_near(got, want.double(), f"output {i}")
        for a, b in zip(fused.tensors(), plain.tensors(), strict=True):
            assert_near(a, b.double(), f"state {i}", 1e-5)
    assert addresses == [t.data_ptr() for t in fused.tensors()]


@pytest.mark.parametrize("kind", ["sliding", "terraced"])
@torch.no_grad()
def test_sums_of_sixteen_bits_are_as_exact_as_those_of_float32(kind: str) -> None:
    """Products on tensor cores take 16 bits; what a key's features lose by that would be the same at each such key."""
    case = Case(20, 4, kind, feature_heads="kv", kv_heads=1, batch=1, size=16, value_size=16, features=16, fold=4)
    tensors, maps, plain = start(case, "hedgehog")
    tensors = tensors._replace(**{name: getattr(tensors, name).half() for name in ("q", "k", "v")})
    maps = maps._replace(q=maps.q.half().float(), k=maps.k.half().float())
    plain = plain._replace(window=plain.window._replace(k=plain.window.k.half(), v=plain.window.v.half()))
    fused = plain
    for i in range(case.n):
        _, plain = step(tensors, i, maps, plain, case, "recurrent")
        _, fused = step(tensors, i, maps, fused, case, "triton")
    assert_near(fused.linear.kv, plain.linear.kv.double(), "kv", 3e-6)
    assert_near(fused.linear.k_sum, plain.linear.k_sum.double(), "k_sum", 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", WIDE, ids=name_of)
@torch.no_grad()
def test_windows_of_several_blocks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings that do not fit into one tile, from full ones on, while the new token goes once around."""
    from lolcats.ops.hybrid.kernels import decode

    monkeypatch.setattr(decode, "LARGEST_TILE", 64 * 64)
    tensors, maps, _ = start(case, "hedgehog")
    filled = 2 * case.window - 2 if case.fold == 1 else case.n - 12
    prefix = tensors.tokens(0, filled)
    state = hybrid_attention(
        prefix.q, prefix.k, prefix.v, maps, tensors.window_factor, case.spec, log_decay=prefix.log_decay,
        return_state=True, impl="chunked",
    ).state  # fmt: skip
    assert state is not None
    plain = fused = state
    for i in range(filled, case.n):
        want, plain = step(tensors, i, maps, plain, case, "recurrent")
        got, fused = step(tensors, i, maps, fused, case, "triton")
        assert_near(got, want.double(), f"output {i}")
        assert_near(fused.linear.kv, plain.linear.kv.double(), f"kv {i}", 1e-5)
        assert_near(fused.window.k, plain.window.k.double(), f"ring {i}", 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "apart"), [("triton", False), ("triton", True), ("recurrent", True)])
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[8]], ids=name_of)
@torch.no_grad()
def test_a_pool_of_states(case: Case, impl: str, apart: bool) -> None:
    """Rows of a pool of six, in any order, are stepped as a batch is; no other row is touched, nor read.

    They pause at different steps, so their blocks are complete at different ones.
    """
    case = case._replace(batch=3, n=20)
    tensors, maps, plain = start(case, "hedgehog")
    pool = plain.map(lambda t: torch.cat([t, t]).fill_(7) if t.is_floating_point() else torch.cat([t, t]))
    places = torch.tensor([4, 1, 2], device=DEVICE)
    if apart:
        pool = rows_apart(pool)
    for held, rows in zip(pool.tensors(), plain.tensors(), strict=True):
        held[places] = rows
    addresses = [t.data_ptr() for t in pool.tensors()]
    for i in range(case.n):
        pauses = i % 4  # 3: none
        indices = torch.where(torch.arange(3, device=DEVICE) == pauses, -1, places).to(
            (torch.int32, torch.int64)[i % 2]
        )
        want, plain = step(tensors, i, maps, plain, case, "recurrent", active=indices >= 0)
        before = [t.clone() for t in pool.tensors()]
        got, same = step(tensors, i, maps, pool, case, impl, state_indices=indices)
        assert same is not None and [t.data_ptr() for t in same.tensors()] == addresses
        assert_near(got, want.double(), f"output {i}")
        assert pauses == 3 or got[pauses].abs().max() == 0
        others = [row for row in range(6) if row not in indices.tolist()]
        for held, old, rows in zip(pool.tensors(), before, plain.tensors(), strict=True):
            assert torch.equal(held[others], old[others])
            assert_near(held[places], rows.double(), f"state {i}", 1e-5)


@pytest.mark.parametrize("impl", ["triton", "recurrent"])
@pytest.mark.parametrize("case", [Case(20, 3, decay=True, features=3, fold=4), Case(20, 4, "terraced", features=3)])
@torch.no_grad()
def test_sums_change_only_where_a_block_is_complete(case: Case, impl: str) -> None:
    tensors, maps, state = start(case._replace(batch=1), "hedgehog")
    changes = []
    for i in range(case.n):
        before = [t.clone() for t in state.linear]
        _, new = step(tensors, i, maps, state, case._replace(batch=1), impl, donate=True)
        changed = [not torch.equal(a, b) for a, b in zip(before, new.linear, strict=True)]
        assert changed[0] == changed[1]
        if DEVICE == "cpu" and impl == "recurrent":  # not even copied
            assert (new.linear.kv is state.linear.kv) != changed[0]
        changes += [i] * changed[0]
        state = new
    assert changes == ([6, 10, 14, 18] if case.kind == "sliding" else [8, 12, 16])


@pytest.mark.parametrize("impl", ["triton", "recurrent"])
@torch.no_grad()
def test_a_state_that_is_not_given_away_stays(impl: str) -> None:
    case = CASES[7]._replace(n=2)
    tensors, maps, state = start(case, "t2r")
    _, state = step(tensors, 0, maps, state, case, impl)
    before = [t.clone() for t in state.tensors()]
    first, new = step(tensors, 1, maps, state, case, impl)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before, strict=True))
    again, _ = step(tensors, 1, maps, state, case, impl)
    assert torch.equal(first, again) and new.length.tolist() == [2] * case.batch


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown way": ({"impl": "fast"}, r"impl must be one of .*; got 'fast'"),
    "features for the kernel": ({"impl": "triton", "maps": False}, r"cannot run this decoding step: .*got features"),
    "indices of another batch": ({"state_indices": torch.zeros(3, dtype=torch.long)}, r"state_indices \(2,\) of int32"),
    "indices of floats": ({"state_indices": torch.zeros(2)}, r"state_indices \(2,\) of int32 or int64"),
    "active of another batch": ({"active": torch.ones(3)}, r"active \(2,\); got \(3,\)"),
    "a state of another window": ({"spec": HybridSpec(7)}, r"a state with 7 window slots; got 5"),
    "too many that wait": ({"impl": "triton", "fold": 200}, r"up to 128 keys may wait; got fold 200"),
    "two tokens": ({"tokens": 2}, r"q \[batch, heads, 1, size\]"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
@torch.no_grad()
def test_refused(changes: dict[str, Any], message: str) -> None:
    changes = dict(changes)
    case = Case(4, 5, fold=changes.pop("fold", 1))
    tensors, maps, state = start(case, "hedgehog")
    changes = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
    spec, part = changes.pop("spec", case.spec), tensors.tokens(0, changes.pop("tokens", 1))
    features = maps if changes.pop("maps", True) else (part.phi_q, part.phi_k)
    with pytest.raises(ValueError, match=message):
        hybrid_step(part.q, part.k, part.v, features, part.window_factor, state, spec, **changes)


def test_a_pool_that_the_kernel_cannot_change_in_place() -> None:
    case = Case(1, 5)
    tensors, maps, state = start(case, "hedgehog")
    pool = state.map(lambda t: torch.stack([t, t], -1)[..., 0])
    with torch.no_grad(), pytest.raises(ValueError, match=r"a pool of contiguous rows; use impl 'auto'"):
        step(tensors, 0, maps, pool, case, "triton", state_indices=torch.arange(2, device=DEVICE))
