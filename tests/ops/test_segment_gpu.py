"""The forward pass by segments on a GPU: that it is the forward pass, and that the operation takes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_segment import BFLOAT16, SETTINGS, SIZES, WHOLE, operands, planned
from torch import Tensor

from lolcats.mixers import Call, build_mixer
from lolcats.ops import HybridSpec, MapWeights, hybrid_attention
from lolcats.ops.hybrid.kernels import launch, segment_launch
from lolcats.ops.hybrid.kernels.launch import Operands, run_forward
from lolcats.ops.hybrid.kernels.segment_launch import refusal, run_segments

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["sliding", "terraced"])
def spec(request: pytest.FixtureRequest) -> HybridSpec:
    """A window of each kind."""
    return HybridSpec(64, request.param)


def segmented(x: Operands, spec: HybridSpec) -> Tensor:
    """The output by segments."""
    return run_segments(planned(x, spec), x)


def present(x: Operands, spec: HybridSpec, save: bool = False) -> Tensor:
    """What the other kernels compute."""
    return run_forward(planned(x, spec), x, WHOLE, save).out


def apart(got: Tensor, want: Tensor) -> float:
    """The difference relative to the numbers."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def exact(x: Operands, spec: HybridSpec) -> Tensor:
    """By the chunked form in float64."""
    q, k, v, map_q, map_k, window_factor = (t.double() for t in x[:6])
    maps = MapWeights("hedgehog", map_q, map_k, log_scale=None if x.factor is None else x.factor.double())
    return hybrid_attention(q, k, v, maps, window_factor, spec, impl="chunked").out


def check(x: Operands, spec: HybridSpec) -> None:
    """As near to the exact output as the other kernels, and the same bits each time."""
    want, got = exact(x, spec), segmented(x, spec)
    assert apart(got, want) <= apart(present(x, spec), want) + BFLOAT16 / 2
    assert all(torch.equal(segmented(x, spec), got) for _ in range(3))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 129, 1037, 2048, 4160])
def test_lengths(n: int, batch: int, spec: HybridSpec) -> None:
    check(operands(n, batch, device="cuda"), spec)


@pytest.mark.parametrize(
    ("n", "batch", "heads", "kv_heads", "map_heads"),
    [
        pytest.param(3001, 1, 32, 8, 32, id="few_segments"),
        pytest.param(17_000, 1, 32, 8, 32, id="sums_in_five_pieces"),
        pytest.param(2111, 5, 32, 8, 8, id="whole_texts_and_a_state_a_key_head"),
        pytest.param(2111, 2, 6, 6, 6, id="as_many_key_heads"),
        pytest.param(2111, 2, 6, 1, 1, id="one_key_head"),
    ],
)
def test_heads(n: int, batch: int, heads: int, kv_heads: int, map_heads: int, spec: HybridSpec) -> None:
    check(operands(n, batch, heads, kv_heads, map_heads, device="cuda"), spec)


def test_layouts_of_memory(spec: HybridSpec) -> None:
    """Heads before tokens, tokens before heads, and parts of one tensor."""
    x = operands(2111, 2, 4, 4, device="cuda")
    want = segmented(x, spec)
    whole = torch.stack([t.transpose(1, 2) for t in x[:3]], 2)
    for parts in ([t.contiguous() for t in x[:3]], [t.transpose(1, 2) for t in whole.unbind(2)]):
        q, k, v = parts
        y = x._replace(q=q, k=k, v=v)
        assert torch.equal(segmented(y, spec), want)


def test_a_row_sees_nothing_of_others(spec: HybridSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it is cut into other segments, which rounds otherwise; cut alike it has the same bits."""
    x = operands(2111, 3, device="cuda")
    alone = x._replace(**{name: getattr(x, name)[1:2].clone() for name in ("q", "k", "v")})
    want = segmented(x, spec)[1:2].clone()
    for t in x[:3]:
        t[0], t[2] = torch.nan, torch.nan
    assert torch.equal(segmented(x, spec)[1:2], want)
    assert planned(alone, spec).segments(4) != planned(x, spec).segments(4)
    assert apart(segmented(alone, spec), want) <= BFLOAT16 / 2
    monkeypatch.setattr(launch, "SUM_PROGRAMS", launch.SUM_PROGRAMS // 3)
    assert torch.equal(segmented(alone, spec), want)


def test_a_token_changes_nothing_before_it(spec: HybridSpec) -> None:
    x = operands(2111, device="cuda")
    want = segmented(x, spec).clone()
    for t in x[:3]:
        t[:, :, 1000:] = 3.0
    assert torch.equal(segmented(x, spec)[:, :, :1000], want[:, :, :1000])


def test_one_half_alone(spec: HybridSpec) -> None:
    """Without softmax the first tokens see nothing, and their output is 0; the other end is softmax alone."""
    x = operands(2111, device="cuda")
    for factor in (-torch.inf, -200.0, 200.0):
        y = x._replace(window_factor=torch.full_like(x.window_factor, factor))
        got, want = segmented(y, spec), present(y, spec)
        assert got.isfinite().all()
        assert apart(got, want) <= 2 * BFLOAT16
    y = x._replace(factor=None)
    assert apart(segmented(y, spec), present(y, spec)) <= 2 * BFLOAT16


def public(x: Operands, spec: HybridSpec, **options: Any) -> Any:
    """`hybrid_attention`, which chooses for itself."""
    maps = MapWeights("hedgehog", x.map_q.float(), x.map_k.float(), log_scale=x.factor)
    return hybrid_attention(x.q, x.k, x.v, maps, x.window_factor, spec, **options)


def test_the_operation_takes_it_without_gradients_alone(spec: HybridSpec) -> None:
    x = operands(2111, 2, device="cuda")
    x.map_q.requires_grad_()
    with torch.no_grad():
        assert refusal(planned(x, spec), x, WHOLE) is None
        assert torch.equal(public(x, spec).out, segmented(x, spec))
        assert not torch.equal(public(x, spec).out, present(x, spec))
    assert torch.equal(public(x, spec).out, present(x, spec, save=True))


@torch.no_grad()
def test_the_state_is_that_of_the_other_kernels(spec: HybridSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens after it see the same."""
    x = operands(2111, 2, device="cuda")
    found = public(x, spec, return_state=True)
    assert torch.equal(found.out, segmented(x, spec))
    monkeypatch.setattr(segment_launch, "SHORTEST", 1 << 40)
    other = public(x, spec, return_state=True)
    assert torch.equal(other.out, present(x, spec))
    for got, want in zip(found.state.linear, other.state.linear, strict=True):
        assert torch.equal(got, want)
    more = operands(100, 2, device="cuda")
    after = more._replace(**{name: getattr(x, name) for name in ("map_q", "map_k", "window_factor", "factor")})
    joined = after._replace(
        **{name: torch.cat([getattr(x, name), getattr(after, name)], 2) for name in ("q", "k", "v")}
    )
    rest = public(after, spec, initial_state=found.state).out
    assert apart(rest, exact(joined, spec)[:, :, 2111:]) <= 2 * BFLOAT16


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"state_heads": "kv"}, {"window_kind": "terraced"}], ids=str)
def test_a_layer_that_keeps_its_state(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, then a token; and all of it at once."""
    launched: list[str] = []
    on = segment_launch.on

    def noted(kernel: Any, grid: tuple[int, ...]) -> Any:
        launched.append(kernel.__name__)
        return on(kernel, grid)

    monkeypatch.setattr(segment_launch, "on", noted)
    mixer = build_mixer("hybrid", SIZES, impl="auto", **SETTINGS | change).cuda()
    x = operands(2112, 1, 8, 2, device="cuda")
    hidden = x.q.new_zeros(1, 2112, 16)
    call = Call(x.q, x.k, x.v, hidden, 128**-0.5)
    prompt, last = (
        Call(x.q[:, :, part], x.k[:, :, part], x.v[:, :, part], hidden[:, part], call.scale)
        for part in (slice(None, -1), slice(-1, None))
    )
    whole, _ = mixer(call)
    first, state = mixer(prompt, keep=True)
    step, _ = mixer(last, state, keep=True)
    assert launched == ["sum_pieces", "scan_pieces", "segment_forward"] * 2
    assert torch.equal(first, whole[:, :, :-1])
    assert apart(step, whole[:, :, -1:]) <= 2 * BFLOAT16


@torch.no_grad()
def test_in_a_graph(spec: HybridSpec) -> None:
    x = operands(2111, 2, device="cuda")
    want = public(x, spec).out
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = public(x, spec).out
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, want)
