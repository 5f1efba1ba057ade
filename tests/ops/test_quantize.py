"""Pairs in 8 and 4 bits: what is decoded is what attention saw, near what was stored wherever it stands in a text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lolcats.mixers.rotation import Layout, Rotation
from lolcats.ops.near import NearSpec, empty_near_state, near_attention, quantize
from lolcats.ops.near.quantize import PairCodec, measure_keys, plain_map, spread

SIZES = [8, 14, 20, 64, 80]
PARTNERS = torch.arange(64).roll(32)


def texts(size: int = 64, tokens: int = 40, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q [2, 6, ...], k and v [2, 3, ...]; two channels of the keys are large in every token."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, tokens, size, generator=generator) for heads in (6, 3, 3))
    k[..., 1], k[..., 1 + size // 2] = k[..., 1] * 0.1 + 20, k[..., 1 + size // 2] * 0.1 - 10
    return q.to(dtype), k.to(dtype), v.to(dtype)


def codec_of(q: Tensor, k: Tensor, bits: int) -> PairCodec:
    size = k.shape[-1]
    return PairCodec(bits, measure_keys(q, k, torch.arange(size).roll(size // 2)))


def rounded_keys(codec: PairCodec, k: Tensor) -> Tensor:
    return codec.coded(k, k, False).k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", [8, 4])
def test_decoded_is_rounded(bits: int, size: int, dtype: torch.dtype) -> None:
    """Bit by bit, at once and token by token."""
    q, k, v = texts(size, dtype=dtype)
    codec = codec_of(q, k, bits)
    stored = codec.encode(k, v)
    assert all(x.dtype == torch.uint8 for x in stored)
    assert stored[0].shape[-1] == codec.key_bytes(size) and codec.value_size(stored[1].shape[-1]) == size
    for got, want in zip(codec.decode(*stored, dtype), codec.coded(k, v, False)[:2], strict=True):
        assert torch.equal(got, want)
    assert all(torch.equal(x, y) for x, y in zip(codec.coded(k, v, True)[2:], stored, strict=True) if x is not None)
    parts = [codec.encode(k[:, :, i : i + 1], v[:, :, i : i + 1]) for i in range(k.shape[2])]
    for whole, each in zip(stored, zip(*parts, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(each, 2))


@pytest.mark.parametrize("bits", [8, 4])
def test_an_empty_state(bits: int) -> None:
    """Encoded by one pair, it is that of all its pairs."""
    q, k, v = texts()
    codec, state = codec_of(q, k, bits), empty_near_state(k, v, NearSpec(5, 2, 3))
    got, want = codec.encode_empty(state), codec.encode_state(state)
    assert all(torch.equal(x, y) for x, y in zip(got.tensors(), want.tensors(), strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_coded_once_for_all(bits: int) -> None:
    """What is given coded gives the output and the state of what is not, whole and in two parts."""
    q, k, v = texts(dtype=torch.bfloat16)
    codec, spec, score = codec_of(q, k, bits), NearSpec(5, 2, 7, 0.1), torch.randn(2, 3, 40)
    state = None
    for part in (slice(0, 23), slice(23, 40)):
        call = q[:, :, part], k[:, :, part], v[:, :, part]
        options = {"score": score[:, :, part], "initial_state": state, "return_state": True, "codec": codec}
        want = near_attention(*call, spec, **options)
        coded = codec.coded(k, v, True).of(lambda x, part=part: x[:, :, part])
        got = near_attention(*call, spec, coded=coded, **options)
        assert torch.equal(got.out, want.out)
        assert want.state is not None and got.state is not None
        assert all(torch.equal(x, y) for x, y in zip(got.state.tensors(), want.state.tensors(), strict=True))
        state = want.state


def test_bytes() -> None:
    for bits, of_key, of_value in ((8, 66, 66), (4, 44, 34)):
        codec = PairCodec(bits, plain_map(3, 64))
        keys, values = codec.encode(*texts()[1:])
        assert (keys.shape[-1], values.shape[-1]) == (of_key, of_value)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.007), (4, 0.1)])
def test_errors_are_those_of_the_bits(bits: int, error: float) -> None:
    q, k, v = texts()
    codec = codec_of(q, k, bits)
    assert float((codec.coded(v, v, False).v - v).std() / v.std()) < error
    small = torch.ones(64, dtype=torch.bool)
    small[[1, 33]] = False
    # 8 bits have one step for all channels of a key, which is that of the large ones
    limit = error if bits == 4 else 3 * error
    assert float((rounded_keys(codec, k) - k)[..., small].std()) < limit, "large channels do not spoil the others"


@pytest.mark.parametrize("bits", [8, 4])
def test_mapped_products_are_products(bits: int) -> None:
    q, k, _ = (x.double() for x in texts())
    codec = codec_of(q, k, bits)
    q, mapped = q.unflatten(1, (3, 2)), codec.map_queries(q).unflatten(1, (3, 2))
    torch.testing.assert_close(mapped @ codec.map_keys(k)[:, :, None].mT, q @ k[:, :, None].mT)


@pytest.mark.parametrize("bits", [8, 4])
def test_no_position_is_beyond_the_range(bits: int) -> None:
    """Keys that are turned far beyond the text that was measured lose no more than those within."""
    q, k, _ = texts(tokens=1000)
    k = k + torch.linspace(0, 4, 64)  # channels that turn slowly have means, as those of trained models do
    angles = torch.arange(1000)[:, None] * 1e5 ** -(torch.arange(32) / 32)

    def rotated(x: Tensor, start: int) -> Tensor:
        turned = angles + start * 1e5 ** -(torch.arange(32) / 32)
        cos, sin = (torch.cat([t, t], -1)[None] for t in (turned.cos(), turned.sin()))
        return Rotation(cos, sin, Layout("half")).apply(x)

    codec = codec_of(rotated(q, 0), rotated(k, 0), bits)
    errors = [(rounded_keys(codec, x) - x).square().mean().sqrt() for x in (rotated(k, 0), rotated(k, 100_000))]
    assert float(errors[1] / errors[0]) < 1.1


def test_channels_that_are_turned_into_each_other_are_alike() -> None:
    order, scale = measure_keys(*texts()[:2], PARTNERS).long()
    assert torch.equal(scale, scale[:, PARTNERS])
    assert order[:, :2].sort(-1).values.tolist() == [[1, 33]] * 3, "the large ones first"
    assert torch.equal(order.sort(-1).values, torch.arange(64).expand(3, 64))


@pytest.mark.parametrize("size", SIZES)
def test_spread_is_orthogonal_and_its_own_inverse(size: int) -> None:
    matrix = spread(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.mT)


@pytest.mark.parametrize("bits", [8, 4])
def test_extremes(bits: int) -> None:
    """Nothing, and numbers as large as bfloat16 models make them."""
    codec = PairCodec(bits, plain_map(3, 64))
    assert float(rounded_keys(codec, torch.zeros(1, 3, 2, 64)).abs().max()) < 1e-4
    large = 1e4 * texts()[2]
    assert float((rounded_keys(codec, large) - large).std() / large.std()) < 0.1


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_pass(bits: int) -> None:
    q, k, v = texts()
    codec = codec_of(q, k, bits)
    want = codec.coded(k, v, False)[:2]
    k, v = k.requires_grad_(), v.requires_grad_()
    got = codec.coded(k, v, False)[:2]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    (got[0].sum() + got[1].sum()).backward()
    assert k.grad is not None and v.grad is not None
    assert bool((k.grad == 1).all()) and bool((v.grad == 1).all())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 1, 128), (5, 2), (300, 8)], ids=str)
def test_the_kernel_spreads_to_the_same_bits(shape: tuple[int, ...], device: str) -> None:
    pytest.importorskip("triton")
    from lolcats.ops.near.kernels.spread import spread_rows

    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got, strided = (spread_rows(y.to(device)).cpu() for y in (x, x.mT.contiguous().mT))
    assert torch.equal(got, spread(x))  # in torch, on the CPU
    assert torch.equal(strided, got)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "value_size"),
    [((1, 1, 1, 64), 64), ((2, 3, 37, 64), 32), ((1, 2, 16, 128), 128), ((3, 1, 5, 16), 16)],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, at what is no number
def test_the_kernel_codes_to_the_same_bits(
    shape: tuple[int, ...], value_size: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out as by a layer and not, with rows of nothing and of no numbers."""
    pytest.importorskip("triton")
    from lolcats.ops.near.kernels.pairs import code_pairs, codes_pairs

    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    generator = torch.Generator().manual_seed(0)
    batch, kv_heads, tokens, size = shape
    k, v = (
        torch.randn(batch, tokens, kv_heads, n, generator=generator).to(device, dtype).transpose(1, 2)
        for n in (size, value_size)
    )
    k[..., :3] *= 50
    v[:, :, 0] = 0
    if tokens > 4:
        k[0, 0, 3, 5], v[0, 0, 4, 0] = torch.nan, torch.inf
    codec = PairCodec(8, measure_keys(k.nan_to_num(), k.nan_to_num(), torch.arange(size, device=device).flip(0)))
    monkeypatch.setattr(quantize, "kernels_available", lambda _: False)  # the form in torch
    want = codec.coded(k, v, True)
    assert codes_pairs(k, v)
    got, again = (
        code_pairs(k, v, codec.key_map, True),
        code_pairs(k.contiguous(), v.mT.contiguous().mT, codec.key_map, False),
    )
    assert again.keys is None and again.values is None
    for a, b, c in ((got.k, want.k, again.k), (got.v, want.v, again.v)):
        assert a.dtype == b.dtype and a.is_contiguous()
        torch.testing.assert_close(a, c, rtol=0, atol=0, equal_nan=True)
        # The interpreter cuts off the digits that bfloat16 does not hold, instead of rounding.
        cut_off = 2.0**-7 if device == "cpu" and dtype == torch.bfloat16 else 0.0
        torch.testing.assert_close(a, b, rtol=cut_off, atol=0, equal_nan=True)
    assert got.keys is not None and want.keys is not None and got.values is not None and want.values is not None
    assert torch.equal(got.values, want.values)
    whole = torch.ones(shape[:3], dtype=torch.bool, device=device)
    if tokens > 4:  # of what is no number the bytes do not matter, but for those of its step
        whole[0, 0, 3] = False
        assert bool(got.keys[0, 0, 3, -2:].clone().view(torch.float16).isnan())
    assert torch.equal(got.keys[whole], want.keys[whole])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_codec_takes_the_kernel_and_gradients_pass(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    q, k, v = (x.to(device) for x in texts())
    codec = codec_of(q, k, 8)
    monkeypatch.setattr(quantize, "kernels_available", lambda _: True)
    assert codec._by_kernel(k, v, True) is not None
    got = codec.coded(k.requires_grad_(), v.requires_grad_(), True)
    (got.k.sum() + got.v.sum()).backward()
    assert k.grad is not None and v.grad is not None and bool((k.grad == 1).all()) and bool((v.grad == 1).all())
    monkeypatch.setattr(quantize, "kernels_available", lambda _: False)
    want = codec.coded(k.detach(), v.detach(), True)
    assert all(torch.equal(a.detach(), b) for a, b in zip(got, want, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_token_alone_has_the_bytes_that_it_has_in_a_text(bits: int) -> None:
    q, k, v = texts()
    codec = codec_of(q, k, bits)
    stored = codec.encode(k, v)
    for i in (0, 17, 39):
        alone = codec.encode(k[:, :, i : i + 1], v[:, :, i : i + 1])
        for got, want in zip(alone, stored, strict=True):
            assert torch.equal(got, want[:, :, i : i + 1])
            assert got.is_contiguous()
