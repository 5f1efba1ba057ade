"""What a kernel reads of the layer's input for a score is as exact as torch in float32; on a CPU interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from lolcats.mixers import Sizes
from lolcats.mixers.scores import LearnedScore

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("no_gradients", "rounding"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DIGIT = 2.0**-23
SHIFT = 30
"""Of a mean, in standard deviations."""
FIRST = 32
"""Channels of a slice."""


def make(kv_heads: int, channels: int) -> LearnedScore:
    torch.manual_seed(kv_heads)
    return LearnedScore(Sizes(kv_heads, kv_heads, 16, 16, channels), False).to(DEVICE)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def read(hidden: Tensor, score: LearnedScore) -> Tensor:
    from lolcats.ops.near.kernels.hidden import read_texts

    return read_texts(hidden, score.weights())


def truth(hidden: Tensor, score: LearnedScore) -> Tensor:
    """In float64, from the weights of float32."""
    y, layers = nnf.layer_norm(hidden.double(), hidden.shape[-1:]), (score.read_hidden, score.from_hidden)
    one, two = ([x.double() for x in layer.parameters()] for layer in layers)
    return nnf.linear(nnf.gelu(nnf.linear(y, *one)), *two)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "shifted", "outliers", "small", "first"])
@pytest.mark.parametrize(
    ("shape", "kv_heads"), [((2, 37, 576), 3), ((1, 5, 41), 1), ((3, 1, 33), 8), ((1, 66, 2000), 2)]
)
def test_as_exact_as_torch(shape: tuple[int, int, int], kv_heads: int, kind: str, dtype: torch.dtype) -> None:
    """But for what is lost where numbers are large against their differences."""
    x, score, lost = random(*shape), make(kv_heads, shape[2]), 1
    if kind == "shifted":
        x += SHIFT
        lost = SHIFT if dtype == torch.bfloat16 else 1  # others are shifted back before they are multiplied
    elif kind == "outliers":
        x[..., 3::97] *= 100
    elif kind == "small":
        x *= 1e-3
    elif kind == "first":  # the mean of a row is taken for near that of its first channels, and here it is not
        x[..., :FIRST] += 100
        lost = (shape[2] / FIRST) ** 0.5
    x = x.to(dtype)
    want, got = truth(x, score), read(x, score)
    assert got.dtype == torch.float32 and got.shape == want.shape
    limit = 2 * rms(score.of_hidden(x) - want) + 0.5 * DIGIT * lost
    assert rms(got - want) < limit
    assert float((got - want).abs().max()) < 5 * limit


@pytest.mark.parametrize("width", [32, 64, 128])
def test_every_width(width: int) -> None:
    x, score = random(2, 9, 96).bfloat16(), make(2, 96)
    score.read_hidden, score.from_hidden = (layer.to(DEVICE) for layer in (nn.Linear(96, width), nn.Linear(width, 4)))
    torch.testing.assert_close(read(x, score), score.of_hidden(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_its_numbers_everywhere(dtype: torch.dtype) -> None:
    """Bit by bit, in any text and place, beside any others, however they lie in memory."""
    x, score = random(3, 70, 80).to(dtype), make(2, 80)
    whole = read(x, score)
    assert torch.equal(read(x[1:, 19:], score), whole[1:, 19:])
    assert torch.equal(read(x[2:, 69:], score), whole[2:, 69:])
    assert torch.equal(read(x.flatten(0, 1)[None], score), whole.flatten(0, 1)[None])
    assert torch.equal(read(x[:1].expand(2, -1, -1), score), whole[:1].expand(2, -1, -1))
    assert torch.equal(read(x.transpose(1, 2).contiguous().transpose(1, 2), score), whole)
    beside = x.clone()
    beside[:, ::2] = float("nan")
    got = read(beside, score)
    assert torch.equal(got[:, 1::2], whole[:, 1::2]) and bool(got[:, ::2].isnan().all())
