"""Feature maps: the formulas head by head, where they start, precision, and heads that share keys."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lolcats.mixers.feature_maps import FEATURE_MAPS, FeatureMap, build_feature_map

NAMES = list(FEATURE_MAPS)
LEARNED = ["hedgehog", "t2r", "exp_dim"]
every_map = pytest.mark.parametrize("name", NAMES)
learned_maps = pytest.mark.parametrize("name", LEARNED)


def random_map(name: str, heads: int = 3, size: int = 4, feature_size: int | None = None) -> FeatureMap:
    """A map in float64 whose parameters differ in every entry."""
    built = build_feature_map(name, heads, size, feature_size).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in built.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return built


def random_x(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def softmax(y: list[float]) -> list[float]:
    weights = [math.exp(a) for a in y]
    return [w / sum(weights) for w in weights]


def literal(name: str, x: list[float], weight: list[list[float]], bias: list[float]) -> list[float]:
    """phi of one vector, one number at a time."""
    if name == "elu":
        return [1 + (a if a > 0 else math.exp(a) - 1) for a in x]
    if name == "relu":
        return [max(0.0, a) for a in x]
    y = [sum(a * row[f] for a, row in zip(x, weight, strict=True)) for f in range(len(weight[0]))]
    if name == "t2r":
        return [max(0.0, a + b) for a, b in zip(y, bias, strict=True)]
    if name == "hedgehog":
        return [max(p, 1e-12) for p in softmax(y) + softmax([-a for a in y])]
    return [math.exp(a - max(y)) for a in y] + [math.exp(min(y) - a) for a in y]


@every_map
def test_formula(name: str) -> None:
    """Every head has its own W (and b), and uses no other."""
    x = random_x(2, 3, 5, 4)
    for feature_size in (2, 4, 7):
        phi = random_map(name, feature_size=feature_size)
        out = phi(x)
        assert out.shape == (2, 3, 5, phi.features)
        weights = phi.get_parameter("weight").tolist() if name in LEARNED else [[]] * 3
        biases = phi.get_parameter("bias").tolist() if name == "t2r" else [[]] * 3
        for b, h in itertools.product(range(2), range(3)):
            want = [literal(name, row, weights[h], biases[h]) for row in x[b, h].tolist()]
            torch.testing.assert_close(out[b, h], torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_number_of_features() -> None:
    for name, given, default in (
        ("hedgehog", 10, 8),
        ("t2r", 5, 4),
        ("elu", 4, 4),
        ("relu", 4, 4),
        ("exp_dim", 10, 8),
    ):
        phi = build_feature_map(name, heads=2, head_dim=4, feature_size=5)
        assert phi.features == phi(random_x(1, 2, 3, 4)).shape[-1] == given, name
        assert build_feature_map(name, heads=2, head_dim=4).features == default, name


@learned_maps
def test_starts_as_the_identity(name: str) -> None:
    """At the start a projected feature is a channel; columns are cut where f < D and repeated where f > D."""
    x = random_x(1, 2, 3, 4, dtype=torch.float32)
    for feature_size, channels in ((4, [0, 1, 2, 3]), (2, [0, 1]), (6, [0, 1, 2, 3, 0, 1])):
        phi = build_feature_map(name, heads=2, head_dim=4, feature_size=feature_size)
        y = x[..., channels]
        want = {
            "hedgehog": torch.cat([y.softmax(-1), (-y).softmax(-1)], -1),
            "t2r": y.relu(),
            "exp_dim": torch.cat([(y - y.amax(-1, True)).exp(), (y.amin(-1, True) - y).exp()], -1),
        }
        torch.testing.assert_close(phi(x), want[name])


def test_defect_09_t2r_has_a_bias_for_each_feature() -> None:
    phi = build_feature_map("t2r", heads=3, head_dim=4, feature_size=5)
    bias = phi.get_parameter("bias")
    assert bias.shape == (3, 5)
    assert bias.abs().max() == 0
    with torch.no_grad():
        bias[1, 2] = 100.0
    changed = phi(torch.zeros(1, 3, 2, 4)).nonzero()[:, [1, 3]].unique(dim=0)
    assert changed.tolist() == [[1, 2]]


def test_hedgehog_is_clamped() -> None:
    """A feature never is zero, so no key is ever lost, and no denominator is."""
    phi = build_feature_map("hedgehog", heads=1, head_dim=4)
    out = phi(torch.tensor([[[[200.0, 0.0, 0.0, -200.0]]]]))
    assert out.min().item() == pytest.approx(1e-12, rel=1e-6, abs=0)
    assert out.max().item() == pytest.approx(1.0)


@every_map
def test_features_are_finite_and_not_negative(name: str) -> None:
    phi = random_map(name).float()
    for size in (0.0, 1.0, 1e3, 1e6):
        out = phi(random_x(2, 3, 5, 4, dtype=torch.float32) * size)
        assert out.isfinite().all()
        assert out.min() >= 0


@every_map
def test_float32_from_low_precision(name: str) -> None:
    """bfloat16 inputs, bfloat16 autocast: the map runs in float32 on the very numbers that it was given."""
    phi = random_map(name).float()
    x = random_x(2, 3, 5, 4, dtype=torch.bfloat16)
    want = phi(x.float())
    assert want.dtype == torch.float32
    assert torch.equal(phi(x), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(phi(x), want)


def test_float64_stays_float64() -> None:
    for name in NAMES:
        assert build_feature_map(name, heads=3, head_dim=4)(random_x(2, 3, 5, 4)).dtype == torch.float64, name


@learned_maps
def test_parameters_are_float32(name: str) -> None:
    """Also where the model around them is built in bfloat16."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        phi = build_feature_map(name, heads=2, head_dim=4)
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in phi.parameters()} == {torch.float32}


@learned_maps
def test_key_head_with_a_map_for_each_query_head(name: str) -> None:
    """6 maps on 2 key heads: maps 0, 1, 2 see key head 0, maps 3, 4, 5 see key head 1."""
    phi = random_map(name, heads=6)
    x = random_x(2, 2, 5, 4)
    assert torch.equal(phi(x), phi(x.repeat_interleave(3, 1)))


@every_map
def test_gradients(name: str) -> None:
    phi = random_map(name, heads=2, feature_size=3)
    names = [n for n, _ in phi.named_parameters()]
    x = random_x(1, 2, 3, 4).requires_grad_()

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(phi, dict(zip(names, values, strict=True)), (x,))

    torch.autograd.gradcheck(function, (x, *phi.parameters()))


def test_learned_says_whether_there_are_parameters() -> None:
    for name in NAMES:
        phi = build_feature_map(name, heads=2, head_dim=4)
        assert phi.learned == (name in LEARNED) == bool(list(phi.parameters())), name


@learned_maps
def test_saved_parameters_give_the_same_map(name: str) -> None:
    phi, other = random_map(name), build_feature_map(name, 3, 4).double()
    other.load_state_dict(phi.state_dict())
    x = random_x(1, 3, 5, 4)
    assert torch.equal(other(x), phi(x))


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"feature_map must be one of hedgehog, t2r, .*; got 'hedge'"):
        build_feature_map("hedge", heads=2, head_dim=4)


def test_feature_size_below_one() -> None:
    with pytest.raises(ValueError, match="feature_size must be at least 1; got 0"):
        build_feature_map("hedgehog", heads=2, head_dim=4, feature_size=0)
