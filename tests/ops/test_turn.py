"""The kernel of rotary embedding gives what families' functions give, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lolcats.ops.elementwise import turn_halves

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("rounding"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]


def case(
    dtype: torch.dtype, batch: int, rows: int, tokens: int, size: int, heads: tuple[int, int] = (6, 2)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, cos and sin, heads as transformers hands them over: views of [B, N, H, D]."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, tokens, h, size, generator=generator).to(DEVICE, dtype).transpose(1, 2) for h in heads)
    angle = torch.randn(rows, tokens, size // 2, generator=generator).to(DEVICE)
    cos, sin = (torch.cat([x, x], -1).to(dtype) for x in (angle.cos(), angle.sin()))
    return q, k, cos, sin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "rows", "tokens", "size"), [(1, 1, 1, 64), (3, 3, 1, 20), (2, 1, 5, 128)])
def test_it_is_that_of_llama(dtype: torch.dtype, batch: int, rows: int, tokens: int, size: int) -> None:
    inputs = case(dtype, batch, rows, tokens, size)
    for got, want in zip(turn_halves(*inputs), apply_rotary_pos_emb(*inputs), strict=True):
        assert got.is_contiguous() and torch.equal(got, want)


@pytest.mark.parametrize("heads", [(8, 1), (9, 3), (24, 16), (71, 1)], ids=str)
def test_heads_of_several_programs(heads: tuple[int, int]) -> None:
    inputs = case(torch.bfloat16, 2, 1, 3, 16, heads)
    for got, want in zip(turn_halves(*inputs), apply_rotary_pos_emb(*inputs), strict=True):
        assert torch.equal(got, want)


def test_refused() -> None:
    q, k, cos, sin = case(torch.float32, 2, 1, 3, 8)
    with pytest.raises(ValueError, match="heads of an even size"):
        turn_halves(q[..., :7], k[..., :7], cos[..., :7], sin[..., :7])
    with pytest.raises(ValueError, match="angles"):
        turn_halves(q, k, cos[..., :4], sin[..., :4])
    with pytest.raises(ValueError, match="all in"):
        turn_halves(q, k, cos.double(), sin)
