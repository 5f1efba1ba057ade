"""Size and effective rank of updates, against their products."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lolcats.evaluation.analysis.lora import lora_modules
from lolcats.training.update_size import update_size


def slow_size(down: Tensor, up: Tensor, scale: float) -> tuple[float, float]:
    """By the singular values of the whole product."""
    update = scale * up.double() @ down.double()
    singular = torch.linalg.svdvals(update)
    share = singular[singular > 1e-12] / singular.sum()
    return float(update.square().sum().sqrt()), math.exp(float(-(share * share.log()).sum()))


def matrices(rank: int, inputs: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


@pytest.mark.parametrize("shape", [(4, 11, 7), (1, 5, 3), (8, 5, 6), (3, 3, 30)])
def test_size_and_effective_rank(shape: tuple[int, int, int]) -> None:
    """Ranks above the smaller side too."""
    down, up = matrices(*shape)
    assert update_size(down, up, 0.5) == pytest.approx(slow_size(down, up, 0.5))


def test_known_updates() -> None:
    identity = torch.eye(6)
    assert update_size(identity[:3], identity[:, :3], 2.0) == pytest.approx((2 * math.sqrt(3), 3.0))
    assert update_size(identity[:1], identity[:, :1], -2.0) == pytest.approx((2.0, 1.0))
    assert update_size(identity[:3], torch.zeros(6, 3), 2.0) == (0.0, 0.0)  # as adapters begin


def named(*modules: str, seed: int = 0, ends: str = "default.weight") -> dict[str, Tensor]:
    found = {"parameter:mixer.window_factor": torch.zeros(3)}
    for number, module in enumerate(modules):
        found |= dict(
            zip((f"{module}.lora_{side}.{ends}" for side in "AB"), matrices(2, 5, 4, seed + number), strict=True)
        )
    return found


def test_modules_by_layer_projection_and_step() -> None:
    """In the order of layers, whatever the order of files and names."""
    names = [
        f"parameter:base_model.model.model.layers.{n}.self_attn.inner.{p}"
        for n in (10, 2)
        for p in ("q_proj", "k_proj")
    ]
    early, late = named(*names, seed=0), named(*names, seed=9)
    found = lora_modules({30: late, 5: early}, 2.0)
    assert [(m.layer, m.projection) for m in found] == [(2, "k_proj"), (2, "q_proj"), (10, "k_proj"), (10, "q_proj")]
    assert all(m.steps == [5, 30] for m in found)
    own = found[3]
    for step, tensors in enumerate((early, late)):
        down, up = (tensors[f"{names[0]}.lora_{side}.default.weight"] for side in "AB")
        expected = slow_size(down, up, 2.0)
        assert (own.norm[step], own.effective_rank[step]) == pytest.approx(expected)


def test_files_of_adapters_and_experts() -> None:
    """peft leaves the adapter's name out of its files; experts of a layer have the same projections."""
    names = ["h.0.mlp.experts.0.up_proj", "h.0.mlp.experts.1.up_proj", "h.0.attn.q_proj", "lm_head"]
    found = lora_modules({1: named(*names, ends="weight")}, 1.0)
    assert [(m.layer, m.projection) for m in found] == [
        (-1, "lm_head"), (0, "mlp.experts.0.up_proj"), (0, "mlp.experts.1.up_proj"), (0, "q_proj")
    ]  # fmt: skip
    assert lora_modules({1: {"weight": torch.zeros(2)}}, 1.0) == []
