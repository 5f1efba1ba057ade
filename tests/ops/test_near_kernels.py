"""The kernels of near attention compute what its definition says, on a CPU by Triton's interpreter."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lolcats.ops.near import NearSpec, empty_near_state, near_attention, near_step

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SCRIPT = Path(__file__).with_name("compile_near.py")


class Case(NamedTuple):
    """Sizes of one call."""

    n: int
    spec: NearSpec
    batch: int = 1
    groups: int = 2
    kv_heads: int = 1
    size: int = 6
    value_size: int = 3
    lengths: tuple[int, ...] | None = None
    levels: int = 0
    """Scores are rounded to so many a unit, so that some are equal; 0: not."""

    @property
    def learned(self) -> bool:
        return self.spec.softcap is not None


def make(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v (and learned sinks) of `dtype`, rounded to it, in float64; and what has no gradient."""
    generator = torch.Generator().manual_seed(case.n)

    def random(heads: int, *size: int) -> Tensor:
        return torch.randn(case.batch, heads, case.n, *size, generator=generator, dtype=torch.float64).to(DEVICE)

    heads = case.groups * case.kv_heads
    leaves = [random(heads, case.size), random(case.kv_heads, case.size), random(case.kv_heads, case.value_size)]
    leaves = [x.to(dtype).double() for x in leaves]
    if case.learned:
        leaves.append(torch.linspace(-1, 1, heads, dtype=torch.float64, device=DEVICE))
    score = random(case.kv_heads)
    score = (score * case.levels).round() if case.levels else score.float().double()
    lengths = None if case.lengths is None else torch.tensor(case.lengths, device=DEVICE)
    return leaves, {"score": score if case.spec.pairs else None, "lengths": lengths}


def outcome(case: Case, dtype: torch.dtype, impl: str, like: torch.dtype) -> list[Tensor]:
    """Output and gradients in `dtype` of numbers that `like` can hold."""
    leaves, extra = make(case, like)
    leaves = [x.to(torch.float32 if x.ndim == 1 and dtype != torch.float64 else dtype) for x in leaves]
    for x in leaves:
        x.requires_grad_()
    if dtype != torch.float64 and extra["score"] is not None:
        extra["score"] = extra["score"].float()
    logits = leaves[3] if case.learned else None
    q, k, v = leaves[:3]
    out = near_attention(q, k, v, case.spec, sink_logits=logits, impl=impl, **extra).out
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def compare(case: Case, dtype: torch.dtype = torch.float32, exact: str = "chunked") -> None:
    want, got = outcome(case, torch.float64, exact, dtype), outcome(case, dtype, "triton", dtype)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        # Learned sinks get a sum over all queries, of which each is rounded.
        terms = case.batch * case.n if b.ndim == 1 else 1
        error = float((a.double() - b).norm() / (b.norm() + 0.4 * (terms * b.numel()) ** 0.5))
        assert error <= (5 if index else 2) * ROUNDING[dtype], f"result {index}: off by {error:.2e}"
        if case.lengths and index == 0:
            assert not any(a[row, :, end:].any() for row, end in enumerate(case.lengths))


SMALL = [
    pytest.param(Case(135, NearSpec(9, sinks=1), groups=1), "reference", id="no pairs"),
    pytest.param(Case(1, NearSpec(4, sinks=2, pairs=3)), "reference", id="a token"),
    pytest.param(
        Case(140, NearSpec(5, 7, 70, softcap=3.0), 2, 1, 2, lengths=(140, 50), levels=3), "reference", id="padding"
    ),
    pytest.param(Case(300, NearSpec(63, 3, 100)), "chunked", id="three blocks"),
    pytest.param(Case(300, NearSpec(63, 3, 100, reach=120)), "chunked", id="pairs that are too old"),
    pytest.param(Case(257, NearSpec(1, 0, 5), groups=1, size=70, value_size=65), "chunked", id="a window of one"),
    pytest.param(Case(135, NearSpec(200, 4, 5, scale=0.7), groups=1), "chunked", id="a window over all"),
]


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="on a GPU the larger ones take their place")
@pytest.mark.parametrize(("case", "exact"), SMALL)
def test_kernels_are_the_definition(case: Case, exact: str) -> None:
    compare(case, exact=exact)


@pytest.mark.parametrize(
    ("spec", "cut", "n"),
    [
        (NearSpec(40, 5, 30), 3, 130),
        (NearSpec(40, 5, 30), 97, 240),
        (NearSpec(70, 0, 0, softcap=2.0), 50, 90),
        (NearSpec(40, 5, 30, reach=90), 97, 240),
    ],
    ids=str,
)
@torch.no_grad()
def test_what_comes_after_a_state(spec: NearSpec, cut: int, n: int) -> None:
    """Texts of two lengths go on, one of them with padding: outputs and the next state."""
    case = Case(n, spec, batch=2, lengths=(n, n - 30))
    leaves, extra = make(case, torch.float32)
    q, k, v = (t.float() for t in leaves[:3])
    score = None if extra["score"] is None else extra["score"].float()
    logits = leaves[3].float() if case.learned else None

    def call(a: int, b: int, impl: str, state: Any, lengths: Tensor) -> Any:
        cut = slice(None), slice(None), slice(a, b)
        return near_attention(
            q[cut], k[cut], v[cut], spec, score=None if score is None else score[cut], lengths=lengths,
            sink_logits=logits, sink_q=None if spec.reach is None else -q[cut], initial_state=state, return_state=True,
            impl=impl,
        )  # fmt: skip

    begun = torch.tensor([cut, cut - 2], device=DEVICE)
    results = []
    for impl in ("chunked", "triton"):
        first = call(0, cut, impl, None, begun)
        rest = call(cut, n, impl, first.state, extra["lengths"] - cut)
        tensors = [t for field in rest.state[:3] if field is not None for t in field if t is not None]
        results.append([first.out, rest.out, *tensors])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("spec", "cut", "n"),
    [
        (NearSpec(40, 5, 30), 3, 130),
        (NearSpec(40, 5, 30), 97, 240),
        (NearSpec(70, 3, 0, softcap=2.0), 50, 90),
        (NearSpec(9, 0, 150), 200, 340),
    ],
    ids=str,
)
def test_gradients_after_a_state(spec: NearSpec, cut: int, n: int) -> None:
    """Of two texts, one of them with padding: as those in torch, whose state has no gradient either."""
    case = Case(n, spec, batch=2, kv_heads=2, lengths=(n, n - 30))
    leaves, extra = make(case, torch.float32)
    score = None if extra["score"] is None else extra["score"].float()
    begun = torch.tensor([cut, cut - 2], device=DEVICE)
    results = []
    for impl in ("chunked", "triton"):
        first, rest = ([t.float()[:, :, part] for t in leaves[:3]] for part in (slice(cut), slice(cut, None)))
        marks = (None, None) if score is None else (score[:, :, :cut], score[:, :, cut:])
        with torch.no_grad():
            state = near_attention(
                first[0], first[1], first[2], spec, score=marks[0], lengths=begun, return_state=True, impl="chunked"
            ).state
        logits = leaves[3].float().requires_grad_() if case.learned else None
        learned = [*(t.requires_grad_() for t in rest), *([] if logits is None else [logits])]
        out = near_attention(
            rest[0], rest[1], rest[2], spec, score=marks[1], lengths=extra["lengths"] - cut, sink_logits=logits,
            initial_state=state, return_state=True, impl=impl,
        ).out  # fmt: skip
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
        results.append([out.detach(), *torch.autograd.grad((out * weight).sum(), learned)])
    for want, got in zip(*results, strict=True):
        assert bool(want.any())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=3e-5)


def test_nothing_is_saved_where_no_gradient_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned sinks are parameters, of which autograd says that they need one wherever they are used."""
    from lolcats.ops.near.kernels import launch

    saves, run = list[bool](), launch.run_forward

    def noted(plan: Any, x: Any, context: Any, save: bool, *rest: Any) -> Any:
        saves.append(save)
        return run(plan, x, context, save, *rest)

    monkeypatch.setattr(launch, "run_forward", noted)
    q, k, v, logits = (t.float() for t in make(Case(4, NearSpec(2, softcap=2.0)), torch.float32)[0])
    for learns in (False, True):
        with torch.set_grad_enabled(learns):
            near_attention(q, k, v, NearSpec(2), sink_logits=torch.nn.Parameter(logits), impl="triton")
    assert saves == [False, True]


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(4, NearSpec(2))
    x = [t.float() for t in make(case, torch.float32)[0]]
    state = near_attention(x[0], x[1], x[2], case.spec, return_state=True, impl="chunked").state
    assert state is not None
    learned = state.map(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)
    wide = [torch.zeros(1, 1, 4, 130, device=DEVICE)] * 3
    calls: list[tuple[list[Tensor], dict[str, Any], str]] = [
        (x, {"impl": "fast"}, "impl 'auto', 'triton', 'chunked', 'reference'; got 'fast'"),
        ([t.double() for t in x], {"impl": "triton"}, r"cannot run this call: it takes bfloat16.*; use impl 'auto'"),
        (wide, {"impl": "triton"}, "head sizes up to 128; got D 130, Dv 130"),
        ([t.requires_grad_() for t in x], {"impl": "triton", "initial_state": learned}, "no gradient to a state"),
    ]
    for (q, k, v), options, message in calls:
        with pytest.raises(ValueError, match=message):
            near_attention(q, k, v, case.spec, **options)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a CUDA device; the tensors are on cpu"):
        near_attention(x[0].cpu(), x[1].cpu(), x[2].cpu(), case.spec, impl="triton")


@pytest.mark.parametrize(
    "call",
    [
        pytest.param("plain", marks=pytest.mark.slow),
        pytest.param("given", marks=pytest.mark.slow),
        pytest.param("state", marks=pytest.mark.exhaustive),
    ],
)
def test_kernels_compile(call: str, tmp_path: Path) -> None:
    """Triton's compiler takes them for an H100; no GPU is needed to know that."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tests.parent / "src"), str(tests)])}
    command = [sys.executable, str(SCRIPT), "bfloat16", "64", call]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr[-2000:]


def kernels() -> list[Any]:
    """All of them that take a spec."""
    from lolcats.ops.near.kernels import backward, decode, forward

    names = ("query_gradients", "slot_gradients", "add_slots", "key_gradients")
    return [forward.near_forward, decode.near_decode, *(getattr(backward, name) for name in names)]


def test_no_window_is_a_constant() -> None:
    """Nor are pairs: key heads of many sizes share a kernel."""
    for kernel in kernels():
        parameters = inspect.signature(kernel.fn).parameters
        sizes = [parameters[name] for name in ("window", "pairs") if name in parameters]  # a step's are in a table
        assert all(size.annotation is inspect.Parameter.empty for size in sizes)
        assert not {"WINDOW", "PAIRS"} & set(parameters)


REAL = NearSpec(256, 4, 192)


@pytest.mark.gpu
@torch.no_grad()
def test_heads_of_many_sizes_share_kernels() -> None:
    """With the same padded number of slots."""

    def compiled() -> list[int]:
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels()]

    def call(window: int, pairs: int, n: int) -> None:
        spec = NearSpec(window, 4, pairs)
        case = Case(n, spec, 2, 3, 3, 64, 64)
        with torch.enable_grad():
            outcome(case, torch.bfloat16, "triton", torch.bfloat16)
        leaves, extra = make(case, torch.bfloat16)
        q, k, v = (x[:, :, :1].bfloat16() for x in leaves)
        state = empty_near_state(k, v, spec)
        near_step(q, k, v, state, spec, score=extra["score"][:, :, :1].float(), impl="triton")

    call(64, 48, 300)
    before = compiled()
    for window, pairs, n in ((1, 33, 100), (100, 57, 257), (250, 60, 1)):
        call(window, pairs, n)
    assert compiled() == before


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 127, 128, 129, 700, 1500])
def test_lengths(n: int) -> None:
    compare(Case(n, REAL, 2, 3, 3, 64, 64), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 80, 128])
def test_types_and_sizes(dtype: torch.dtype, size: int) -> None:
    compare(Case(600, NearSpec(100, 3, 50, softcap=10.0), 2, 2, 2, size, size, (600, 333)), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [NearSpec(64), NearSpec(1, 0, 16), NearSpec(300, 0, 1000), NearSpec(500, 20)], ids=str)
def test_specs(spec: NearSpec) -> None:
    compare(Case(1300, spec, 1, 4, 2, 64, 64), torch.bfloat16)


@pytest.mark.gpu
def test_same_numbers_again() -> None:
    case = Case(2048, REAL, 4, 3, 3, 64, 64)
    first, second = (outcome(case, torch.bfloat16, "triton", torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
