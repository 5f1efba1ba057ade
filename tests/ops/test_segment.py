"""The forward pass by segments: when it is taken, that it compiles, and on a GPU that it is the forward pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lolcats.mixers import Call, Sizes, build_mixer
from lolcats.ops import HybridSpec, MapWeights, hybrid_attention

pytest.importorskip("triton")
from lolcats.ops.hybrid.kernels import segment_launch
from lolcats.ops.hybrid.kernels.launch import Context, Operands, Plan, make_plan, run_forward
from lolcats.ops.hybrid.kernels.segment_launch import NEEDED, SHORTEST, missing_names, refusal, run_segments

SCRIPT = Path(__file__).with_name("compile_segment.py")
BFLOAT16 = 2.0**-8
PLAIN, WHOLE = HybridSpec(64), Context()


def operands(
    n: int, batch: int = 1, heads: int = 4, kv_heads: int = 2, map_heads: int = 4, size: int = 128, device: str = "cpu"
) -> Operands:
    """Random tokens in the layout of a layer, maps of 64 columns and parameters of all heads."""
    generator = torch.Generator(device).manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    q, k, v = (normal(batch, n, h, size).bfloat16().transpose(1, 2) for h in (heads, kv_heads, kv_heads))
    map_q, map_k = ((normal(h, size, 64) / 5).bfloat16() for h in (heads, map_heads))
    return Operands(q, k, v, map_q, map_k, normal(heads), factor=normal(heads) / 4)


def planned(x: Operands, spec: HybridSpec = PLAIN, kind: str = "hedgehog", c: Context = WHOLE) -> Plan:
    return make_plan(x, c, spec, kind)


def test_what_is_taken_but_for_the_device() -> None:
    x = operands(SHORTEST, 3)
    assert refusal(planned(x), x, WHOLE) == "it needs compute capability 9"
    x = operands(SHORTEST, map_heads=2)._replace(factor=None)
    assert refusal(planned(x, HybridSpec(64, scale=0.1, fold=16)), x, WHOLE) == "it needs compute capability 9"


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("bfloat16", {"v": torch.zeros(1, 2, SHORTEST, 128, dtype=torch.float16)}),
        ("128 numbers", {"v": torch.zeros(1, 2, SHORTEST, 64, dtype=torch.bfloat16)}),
        ("64 columns", {"map_q": torch.zeros(4, 128, 32), "map_k": torch.zeros(4, 128, 32)}),
        ("no sinks", {"sink_logits": torch.zeros(4)}),
        ("no decay", {"log_decay": torch.zeros(1, 4, SHORTEST)}),
        ("copy engine", {"k": torch.zeros(1, 2, 1, 128, dtype=torch.bfloat16).expand(1, 2, SHORTEST, 128)}),
    ],
)
def test_tensors_that_are_refused(reason: str, change: dict[str, Tensor]) -> None:
    x = operands(SHORTEST)._replace(**change)
    assert reason in (refusal(planned(x), x, WHOLE) or "")


@pytest.mark.parametrize(
    ("reason", "spec"),
    [
        ("sliding window of 64", HybridSpec(65)),
        ("sliding window of 64", HybridSpec(64, "terraced")),
        ("no sinks", HybridSpec(64, sinks=1)),
        ("no softcap", HybridSpec(64, softcap=5.0)),
        ("scale above 0", HybridSpec(64, scale=0.0)),
    ],
)
def test_settings_that_are_refused(reason: str, spec: HybridSpec) -> None:
    x = operands(SHORTEST)
    assert reason in (refusal(planned(x, spec), x, WHOLE) or "")


def test_calls_that_are_refused() -> None:
    x = operands(SHORTEST - 1)
    assert f"{SHORTEST} tokens" in (refusal(planned(x), x, WHOLE) or "")
    x = operands(SHORTEST)
    assert "hedgehog" in (refusal(planned(x, kind="t2r"), x, WHOLE) or "")
    rows = Context(torch.tensor([[0, 0, SHORTEST, 0]], dtype=torch.int32))
    initial = Context(initial=torch.zeros(1, 4, 128 * 129))
    for context in (rows, initial):
        assert "no state before" in (refusal(planned(x, c=context), x, context) or "")


def test_this_triton_has_all_names() -> None:
    assert not missing_names(NEEDED)


def test_names_that_are_missing_are_told() -> None:
    language = "triton.experimental.gluon.language"
    needed = {language: "warp_specialize(x,y) barrier|fence nothing|none gluon.x", "triton.nowhere": "x"}
    assert missing_names(needed) == ["warp_specialize(x,y)", "nothing|none", "gluon.x", "triton.nowhere"]


@pytest.mark.parametrize(("segments", "split"), [(3, 2), (2, 5), (1, 2)])
def test_states_before_segments(segments: int, split: int) -> None:
    """Sums of pieces are added up; on a CPU by Triton's interpreter."""
    from lolcats.ops.hybrid.kernels.segment import scan_pieces

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sums = torch.randn(2, segments - 1, split, 128 * 129, device=device)
    before = torch.full((2, segments, 128 * 128), torch.nan, dtype=torch.bfloat16, device=device)
    before_sum = torch.full((2, segments, 128), torch.nan, device=device)
    segment_launch.on(scan_pieces, (2, 33))(sums, before, before_sum, segments, split, MOST=5, BLOCK=512)
    want = torch.cat([torch.zeros(2, 1, 128 * 129, device=device), sums.sum(2)], 1).cumsum(1)
    torch.testing.assert_close(before.float(), want[..., : 128 * 128], rtol=2 * BFLOAT16, atol=1e-5)
    torch.testing.assert_close(before_sum, want[..., 128 * 128 :], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_kernels_compile(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tests.parent / "src"), str(tests)])}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr[-2000:]


def present(x: Operands, save: bool = False) -> Tensor:
    """What the other kernels compute."""
    return run_forward(planned(x), x, WHOLE, save).out


def apart(got: Tensor, want: Tensor) -> float:
    """The difference relative to the numbers."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def exact(x: Operands) -> Tensor:
    """By the chunked form in float64."""
    q, k, v, map_q, map_k, window_factor = (t.double() for t in x[:6])
    maps = MapWeights("hedgehog", map_q, map_k, log_scale=None if x.factor is None else x.factor.double())
    return hybrid_attention(q, k, v, maps, window_factor, PLAIN, impl="chunked").out


def check(x: Operands) -> None:
    """As near to the exact output as the other kernels, and the same bits each time."""
    want, got = exact(x), run_segments(planned(x), x)
    assert apart(got, want) <= apart(present(x), want) + BFLOAT16 / 2
    assert all(torch.equal(run_segments(planned(x), x), got) for _ in range(3))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 129, 1037, 2048, 4160])
def test_lengths(n: int, batch: int) -> None:
    check(operands(n, batch, device="cuda"))


@pytest.mark.gpu
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
def test_heads(n: int, batch: int, heads: int, kv_heads: int, map_heads: int) -> None:
    check(operands(n, batch, heads, kv_heads, map_heads, device="cuda"))


@pytest.mark.gpu
def test_layouts_of_memory() -> None:
    """Heads before tokens, tokens before heads, and parts of one tensor."""
    x = operands(2111, 2, 4, 4, device="cuda")
    want = run_segments(planned(x), x)
    whole = torch.stack([t.transpose(1, 2) for t in x[:3]], 2)
    for parts in ([t.contiguous() for t in x[:3]], [t.transpose(1, 2) for t in whole.unbind(2)]):
        q, k, v = parts
        y = x._replace(q=q, k=k, v=v)
        assert torch.equal(run_segments(planned(y), y), want)


@pytest.mark.gpu
def test_a_row_sees_nothing_of_others() -> None:
    x = operands(2111, 3, device="cuda")
    alone = x._replace(q=x.q[1:2], k=x.k[1:2], v=x.v[1:2])
    for t in x[:3]:
        t[0], t[2] = torch.nan, torch.nan
    assert torch.equal(run_segments(planned(x), x)[1:2], run_segments(planned(alone), alone))


@pytest.mark.gpu
def test_a_token_changes_nothing_before_it() -> None:
    x = operands(2111, device="cuda")
    want = run_segments(planned(x), x).clone()
    for t in x[:3]:
        t[:, :, 1000:] = 3.0
    assert torch.equal(run_segments(planned(x), x)[:, :, :1000], want[:, :, :1000])


@pytest.mark.gpu
def test_one_half_alone() -> None:
    """Without softmax the first tokens see nothing, and their output is 0; the other end is softmax alone."""
    x = operands(2111, device="cuda")
    for factor in (-torch.inf, -200.0, 200.0):
        y = x._replace(window_factor=torch.full_like(x.window_factor, factor))
        got, want = run_segments(planned(y), y), present(y)
        assert got.isfinite().all()
        assert apart(got, want) <= 2 * BFLOAT16
    y = x._replace(factor=None)
    assert apart(run_segments(planned(y), y), present(y)) <= 2 * BFLOAT16


def public(x: Operands, **options: Any) -> Any:
    """`hybrid_attention`, which chooses for itself."""
    maps = MapWeights("hedgehog", x.map_q.float(), x.map_k.float(), log_scale=x.factor)
    return hybrid_attention(x.q, x.k, x.v, maps, x.window_factor, PLAIN, **options)


@pytest.mark.gpu
def test_the_operation_takes_it_without_gradients_alone() -> None:
    x = operands(2111, 2, device="cuda")
    x.map_q.requires_grad_()
    with torch.no_grad():
        assert refusal(planned(x), x, WHOLE) is None
        assert torch.equal(public(x).out, run_segments(planned(x), x))
        assert not torch.equal(public(x).out, present(x))
    assert torch.equal(public(x).out, present(x, save=True))


@pytest.mark.gpu
@torch.no_grad()
def test_the_state_is_that_of_the_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens after it see the same."""
    x = operands(2111, 2, device="cuda")
    found = public(x, return_state=True)
    assert torch.equal(found.out, run_segments(planned(x), x))
    monkeypatch.setattr(segment_launch, "SHORTEST", 1 << 40)
    other = public(x, return_state=True)
    assert torch.equal(other.out, present(x))
    for got, want in zip(found.state.linear, other.state.linear, strict=True):
        assert torch.equal(got, want)
    more = operands(100, 2, device="cuda")
    after = more._replace(**{name: getattr(x, name) for name in ("map_q", "map_k", "window_factor", "factor")})
    joined = after._replace(
        **{name: torch.cat([getattr(x, name), getattr(after, name)], 2) for name in ("q", "k", "v")}
    )
    rest = public(after, initial_state=found.state).out
    assert apart(rest, exact(joined)[:, :, 2111:]) <= 2 * BFLOAT16


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("state_heads", ["query", "kv"])
def test_a_layer_that_keeps_its_state(state_heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, then a token; and all of it at once."""
    launched: list[str] = []
    launch = segment_launch.on

    def noted(kernel: Any, grid: tuple[int, ...]) -> Any:
        launched.append(kernel.__name__)
        return launch(kernel, grid)

    monkeypatch.setattr(segment_launch, "on", noted)
    sizes = Sizes(8, 2, 128, 128, 16)
    settings = {"feature_map": "hedgehog", "feature_size": None, "window_kind": "sliding", "decay": "none"}
    mixer = build_mixer("hybrid", sizes, impl="auto", window=64, sinks=0, fold=16, state_heads=state_heads, **settings)
    mixer = mixer.cuda()
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


@pytest.mark.gpu
@torch.no_grad()
def test_in_a_graph() -> None:
    x = operands(2111, 2, device="cuda")
    want = public(x).out
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = public(x).out
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, want)
