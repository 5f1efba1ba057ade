"""Pairs in 8 and 4 bits: what is decoded is what attention saw, within half a step, and nothing drifts."""

from __future__ import annotations

import pytest
import torch

from lolcats.ops.near.quantize import PairCodec, key_range


def pairs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 3, 40, 8, generator=generator) for _ in range(2))
    k[..., 1] = k[..., 1] * 0.1 + 20  # a channel that is large in every token
    return k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [8, 4])
def test_decoded_is_rounded(bits: int, dtype: torch.dtype) -> None:
    k, v = pairs(dtype)
    codec = PairCodec(bits, *key_range(k, bits))
    keys, values = codec.encode(k, v)
    assert keys.dtype == values.dtype == torch.uint8
    assert keys.shape[-1] == bits and values.shape[-1] == bits + 4
    decoded = codec.decode(keys, values, dtype)
    for got, want in zip(decoded, (codec.round_keys(k), codec.round_values(v)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.15)])
def test_errors_are_those_of_the_bits(bits: int, error: float) -> None:
    k, v = pairs()
    codec = PairCodec(bits, *key_range(k, bits))
    assert float((codec.round_keys(k) - k).std() / (k - k.mean((0, 2), keepdim=True)).std()) < error
    assert float((codec.round_values(v) - v).std() / v.std()) < error
    spread = k[..., 1].std()
    assert float((codec.round_keys(k) - k)[..., 1].std() / spread) < 1.5 * error, "the large channel as well as others"


def test_gradients_pass() -> None:
    k, v = pairs()
    low, high = (x.requires_grad_() for x in key_range(k, 4))
    k, v = k.requires_grad_(), v.requires_grad_()
    codec = PairCodec(4, low, high)
    (codec.round_keys(k).sum() + codec.round_values(v).sum()).backward()
    assert k.grad is not None and v.grad is not None and low.grad is not None and high.grad is not None
    inside = (k > low[:, None] + 1e-3) & (k < high[:, None] - 1e-3)
    outside = (k < low[:, None] - 1e-3) | (k > high[:, None] + 1e-3)
    assert bool((k.grad[inside] == 1).all()) and bool((v.grad == 1).all())
    assert bool(outside.any()) and not k.grad[outside].any() and bool((low.grad + high.grad).abs().max() > 0)
