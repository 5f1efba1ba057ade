"""The kernels of RMS norms and gated products give what torch gives, rounded where it rounds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from lolcats.ops.elementwise import ACTIVATIONS, NORM_FORMS, NormForm, gated_product, kernels_refuse, rms_norm

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("rounding"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCRIPT = Path(__file__).with_name("compile_elementwise.py")
EPS = 1e-6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def torch_norm(x: Tensor, weight: Tensor, form: NormForm) -> Tensor:
    """As modules of transformers write it."""
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    if not form.rounds_first:
        return (wide * (1 + weight.float() if form.adds_one else weight)).to(x.dtype)
    if form.adds_one:
        return (wide.to(x.dtype).float() * (1 + weight.float())).to(torch.promote_types(x.dtype, weight.dtype))
    return weight * wide.to(x.dtype)


def torch_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return (nnf.silu(gate) if activation == "silu" else nnf.gelu(gate, approximate="tanh")) * up


def assert_as_good(got: Tensor, same: Tensor, exact: Tensor) -> None:
    """The error against float64 is that of torch in the same format, plus little; a number may round the other way."""
    assert got.dtype == same.dtype
    eps = torch.finfo(got.dtype).eps
    scale = exact.abs() + exact.abs().mean()
    error, own = ((x.double() - exact).abs() / scale for x in (got, same))
    assert float(error.max()) <= float(own.max()) + eps / 2 + 4e-7
    assert float(error.mean()) <= 1.02 * float(own.mean()) + 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 8, 64, 576, 960, 2304])
def test_norms_are_those_of_torch(size: int, dtype: torch.dtype) -> None:
    x, weight = (3 * random(3, size)).to(dtype), random(size, seed=1).to(dtype)
    wide = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS)
    for form in NORM_FORMS:
        want = torch_norm(x, weight, form)
        exact = wide * (weight.double() + form.adds_one)
        assert_as_good(rms_norm(x, weight, EPS, form), want, exact)
        other = NORM_FORMS[NORM_FORMS.index(form) - 2]
        assert not torch.allclose(rms_norm(x, weight, EPS, other), want), "1 + w is not w"


@pytest.mark.parametrize("form", NORM_FORMS, ids=str)
def test_where_a_norm_is_rounded(form: NormForm) -> None:
    """In bfloat16 nearly all numbers are torch's to the last bit, which those of another rounding are not."""
    x, weight = random(16, 960).bfloat16(), random(960, seed=1).bfloat16()
    want = torch_norm(x, weight, form)
    got = [int((rms_norm(x, weight, EPS, f) != want).sum()) for f in (form, form._replace(rounds_first=not form[1]))]
    assert got[0] <= 15 < 1000 < got[1]


def test_weights_of_more_digits_widen_as_in_torch() -> None:
    x, weight = random(2, 3, 40).bfloat16(), random(40, seed=1)
    for form in NORM_FORMS:
        want = torch_norm(x, weight, form)
        got = rms_norm(x, weight, EPS, form)
        assert (got.dtype, got.shape) == (torch.float32 if form.rounds_first else torch.bfloat16, x.shape)
        torch.testing.assert_close(got, want)


def test_small_rows_are_bounded_by_epsilon() -> None:
    x, weight = torch.full((2, 20), 1e-3, device=DEVICE), torch.ones(20, device=DEVICE)
    x[1] = 0
    got = rms_norm(x, weight, EPS, NormForm(False, False))
    torch.testing.assert_close(got[0], torch.full_like(got[0], 0.5**0.5))
    assert not got[1].any()


@pytest.mark.parametrize("rows", [1, 2, 17, 64])
def test_each_row_has_its_own_root(rows: int) -> None:
    x, weight = random(rows, 48) * torch.arange(1, rows + 1, device=DEVICE)[:, None], random(48, seed=1)
    torch.testing.assert_close(rms_norm(x, weight, EPS, NORM_FORMS[0]), torch_norm(x, weight, NORM_FORMS[0]))


def test_rows_in_any_order_of_memory() -> None:
    x, weight = random(4, 6, 24), random(24, seed=1)
    turned = x.transpose(0, 1)
    for form in NORM_FORMS[::2]:
        torch.testing.assert_close(rms_norm(turned, weight, EPS, form), rms_norm(x, weight, EPS, form).transpose(0, 1))
    up = random(6, 4, 24, seed=2)
    torch.testing.assert_close(gated_product(turned, up, "silu"), torch_product(turned, up, "silu"))
    assert rms_norm(x[:0], weight, EPS, NORM_FORMS[0]).shape == (0, 6, 24)
    assert gated_product(up[:0], up[:0], "silu").shape == (0, 4, 24)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_products_are_those_of_torch(activation: str, dtype: torch.dtype) -> None:
    for rows, size, scale in ((1, 1536, 1.0), (3, 1001, 4.0), (1, 7, 100.0)):
        gate, up = (scale * random(rows, size)).to(dtype), random(rows, size, seed=1).to(dtype)
        want = torch_product(gate, up, activation)
        exact = torch_product(gate.double(), up.double(), activation)
        assert_as_good(gated_product(gate, up, activation), want, exact)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, form = random(2, 8), random(8), NORM_FORMS[0]
    with pytest.raises(ValueError, match=r"expected a weight \(8,\); got \(4,\)"):
        rms_norm(x, weight[:4], EPS, form)
    with pytest.raises(ValueError, match="rows of 1 to 16384 numbers"):
        rms_norm(random(1, 16385), random(16385), EPS, form)
    with pytest.raises(ValueError, match=r"float32; got torch\.float64"):
        rms_norm(x.double(), weight, EPS, form)
    with pytest.raises(ValueError, match=r"expected up \(2, 8\); got \(8,\)"):
        gated_product(x, weight, "silu")
    with pytest.raises(ValueError, match=r"expected up in torch\.float32"):
        gated_product(x, x.half(), "silu")
    with pytest.raises(ValueError, match="activation of silu, gelu_tanh; got relu"):
        gated_product(x, x, "relu")


def test_a_cpu_has_the_interpreter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "CUDA" in str(kernels_refuse(torch.device("cpu")))
    x = torch.ones(1, 8)
    with pytest.raises(ValueError, match="CUDA"):
        gated_product(x, x, "silu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels_refuse(torch.device("cpu")) is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_compile(dtype: str, tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tests.parent / "src"), str(tests)])}
    done = subprocess.run([sys.executable, str(SCRIPT), dtype], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "10 launches\n"), done.stdout + done.stderr[-2000:]
