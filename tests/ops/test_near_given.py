"""The kernels of the attention that later queries give each key, against the same in torch; on a CPU interpreted."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lolcats.mixers import Call
from lolcats.mixers.scores import SMALLEST, Window, attention_given, attention_given_beyond
from lolcats.ops.near.given import head_windows, kernel_given

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


class Case(NamedTuple):
    """Sizes of one call."""

    n: int
    window: Window
    batch: int = 1
    groups: int = 2
    kv_heads: int = 1
    size: int = 6
    softcap: float | None = None
    learned: bool = False


def make(case: Case, dtype: torch.dtype) -> Call:
    """A whole text in each row, in the layout of a layer; numbers that `dtype` can hold."""
    generator = torch.Generator().manual_seed(case.n)

    def random(heads: int) -> Tensor:
        x = torch.randn(case.batch, case.n, heads, case.size, generator=generator)
        return x.to(DEVICE, dtype).transpose(1, 2)

    heads = case.groups * case.kv_heads
    q, k = 2 * random(heads), random(case.kv_heads)
    sinks = torch.linspace(-1, 3, heads, device=DEVICE) if case.learned else None
    hidden = torch.zeros(case.batch, case.n, 1, device=DEVICE)
    return Call(q, k, k, hidden, case.size**-0.5, softcap=case.softcap, sink_logits=sinks)


def by_kernels(call: Call, window: Window) -> Tensor:
    """Also on a CPU, where `kernel_given` leaves it to torch."""
    from lolcats.ops.near.kernels.given import far_weights

    windows = head_windows(window, call.k)
    return far_weights(call.q, call.k, windows, call.scale, call.softcap, call.sink_logits, SMALLEST)


def exact(call: Call, window: Window) -> Tensor:
    """In torch, with products that are not rounded to 16 bits."""
    return attention_given_beyond(replace(call, q=call.q.float(), k=call.k.float()), [window])[0]


SMALL = [
    pytest.param(Case(1, 1), id="a token"),
    pytest.param(Case(65, 1, groups=3), id="a window of one"),
    pytest.param(Case(130, (200, 3), batch=2, kv_heads=2, size=5), id="a window beyond the text"),
    pytest.param(Case(200, (1, 64, 130), groups=1, kv_heads=3, softcap=2.0, learned=True), id="cap and sinks"),
    pytest.param(Case(193, (127, 70), kv_heads=2, size=70, learned=True), id="sinks"),
]


@pytest.mark.skipif(ON_GPU, reason="on a GPU the larger ones take their place")
@pytest.mark.parametrize("case", SMALL)
def test_kernels_are_what_torch_computes(case: Case) -> None:
    call = make(case, torch.float32)
    found = by_kernels(call, case.window)
    assert found.shape == (case.batch, case.kv_heads, case.n, 2) and found.dtype == torch.float32
    torch.testing.assert_close(found, exact(call, case.window), rtol=1e-5, atol=2e-5)


def test_a_cpu_is_left_to_torch() -> None:
    call = make(Case(40, 3), torch.float32)
    q, k = call.q.cpu(), call.k.cpu()
    assert kernel_given(q, k, 3, scale=1.0, softcap=None, sink_logits=None, least=SMALLEST) is None


def test_padded_texts_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels know none; what comes to them is in the dtype of v, as autocast would have it."""
    call, asked = make(Case(40, 3), torch.float32), []

    def kernels(q: Tensor, k: Tensor, window: Window, **how: object) -> None:
        asked.append((q.dtype, k.dtype, window, how))

    monkeypatch.setattr("lolcats.mixers.scores.kernel_given", kernels)
    attention_given(replace(call, padding=torch.ones(1, 40, dtype=torch.bool, device=DEVICE)), 3)
    attention_given(replace(call, segments=torch.zeros(1, 40, dtype=torch.int64, device=DEVICE)), 3)
    assert not asked
    attention_given(replace(call, v=call.v.bfloat16()), 3)
    how = {"scale": call.scale, "softcap": None, "sink_logits": None, "least": SMALLEST}
    assert asked == [(torch.bfloat16, torch.bfloat16, 3, how)]


def test_windows_of_heads() -> None:
    k = torch.zeros(1, 3, 50, 2)
    assert head_windows((1, 2**40, 7), k).tolist() == [1, 50, 7]
    assert head_windows(9, k).tolist() == [9, 9, 9]


LARGE = [
    Case(1, 1, groups=3, kv_heads=3, size=64),
    Case(1000, (1, 256, 999), batch=2, groups=3, kv_heads=3, size=64),
    Case(2048, (16, 300, 2048), groups=3, kv_heads=3, size=64),
    Case(700, 100, batch=2, groups=4, kv_heads=2, size=128, softcap=10.0),
    Case(513, (65, 64), groups=1, kv_heads=2, size=80, softcap=10.0, learned=True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    """Weights are float32 whatever the inputs are: only the order of the sums differs from torch."""
    call = make(case, dtype)
    found = attention_given(call, case.window)
    assert torch.equal(found, by_kernels(call, case.window)), "the same numbers again, by the kernels"
    torch.testing.assert_close(found, exact(call, case.window), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """Nothing waits for the device, with windows of their own for the key heads either; by kernels and in torch."""
    case = LARGE[1]
    call = make(case, torch.bfloat16)
    expected = attention_given(call, case.window), attention_given_beyond(call, [case.window])[0]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attention_given(call, case.window), attention_given_beyond(call, [case.window])[0]
    graph.replay()
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
