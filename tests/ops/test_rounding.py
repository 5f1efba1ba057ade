"""Sums that are kept in bfloat16 go on growing and decaying."""

from __future__ import annotations

import torch

from lolcats.ops.rounding import to_bfloat16


def test_numbers_of_bfloat16_and_the_special_ones_stay() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert to_bfloat16(x).float().equal(x)
    special = torch.tensor([0.0, float("inf"), -float("inf")])
    assert to_bfloat16(special).float().equal(special) and bool(to_bfloat16(torch.tensor([torch.nan])).isnan())


def test_rounds_to_a_neighbour_and_in_the_mean_to_the_number() -> None:
    for sign in (1.0, -1.0):
        x = sign * torch.linspace(1.0, 1.9, 40_000)
        rounded = to_bfloat16(x).float()
        assert float((rounded - x).abs().max()) < 2**-7
        assert abs(float((rounded - x).mean())) < 1e-4  # the standard error is 1.6e-5
        assert float(((rounded - x).abs() > 2**-9).float().mean()) > 0.3  # not just to the nearest


def test_a_long_sum_with_a_slow_decay_is_right() -> None:
    terms = torch.rand(3000, 64, generator=torch.Generator().manual_seed(1)) * 2
    keep = 1 - 1 / 4096
    exact, ours, nearest = torch.zeros(64), torch.zeros(64).bfloat16(), torch.zeros(64).bfloat16()
    for term in terms:
        exact = exact * keep + term
        ours = to_bfloat16(ours.float() * keep + term)
        nearest = (nearest.float() * keep + term).bfloat16()
    errors = ours.float() / exact - 1
    assert abs(float(errors.mean())) < 0.02 and float(errors.square().mean().sqrt()) < 0.1
    assert float((nearest.float() / exact - 1).max()) < -0.5  # what rounding to nearest would do
