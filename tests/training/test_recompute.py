"""Gradient checkpointing changes no gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lolcats import LinearizationConfig, convert
from lolcats.config import FinetuneConfig
from lolcats.config.mixers import BlendConfig
from lolcats.training import FinetuneStage
from lolcats.training.batches import Batch
from lolcats.training.window_control import WindowStage
from tiny import perturb

Tokens = Callable[..., Tensor]
MIXERS = {
    "hybrid": LinearizationConfig(window=4),
    "blend": BlendConfig(window=4, kept={"pairs": 4}, budget="uniform"),  # type: ignore[arg-type]
}
SETTINGS: dict[str, dict[str, Any]] = {
    "kl": {"kl_factor": 1.0},
    "dropout": {"dropout": 0.3},
    "passing": {"kl_factor": 1.0, "passing": {"share": 0.5, "chunks": 2}},
    "full": {"method": "full"},
}


def student_of(teacher: PreTrainedModel, ids: Tensor, mixer: str = "hybrid") -> PreTrainedModel:
    return perturb(convert(copy.deepcopy(teacher), MIXERS[mixer], input_ids=ids, seed=0))


def gradients(
    student: PreTrainedModel, kind: type[FinetuneStage], ids: Tensor, window: int | None = None, **changes: Any
) -> dict[str, Tensor | None]:
    """Of one batch, whose texts are read in two parts where the settings pass states on."""
    torch.manual_seed(0)
    config = FinetuneConfig(**{"rank": 2, "train_feature_maps": True, "batch_size": 4, **changes})
    stage = kind(student.train("dropout" in changes), config)
    for name, p in stage.parameters().items():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    ids = ids.reshape(2, -1) if "passing" in changes else ids
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), None, None)
    batch.chunk = ids.shape[1] // 2 if "passing" in changes else None
    with stage.windowed(window):
        stage.backward(batch, 1.0)
    return {name: p.grad for name, p in stage.parameters().items()}


def assert_equal(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> None:
    assert one.keys() == other.keys()
    assert any(gradient is not None and gradient.any() for gradient in one.values())
    for name, gradient in one.items():
        got = other[name]
        assert (gradient is None and got is None) or torch.equal(gradient, got), name  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_gradients_are_the_same_to_the_last_bit(teacher: Any, tokens: Tokens, mixer: str, name: str) -> None:
    ids = tokens(4, 16)
    kept, again = (
        gradients(
            student_of(teacher, ids, mixer), FinetuneStage, ids, gradient_checkpointing=on, **SETTINGS[name]
        )
        for on in (False, True)
    )  # fmt: skip
    assert_equal(kept, again)


@pytest.mark.parametrize(("kind", "window"), [(WindowStage, None), (FinetuneStage, 1)])
def test_mode_and_window_of_a_step_hold_on_the_way_back(
    teacher: Any, tokens: Tokens, kind: type[FinetuneStage], window: int | None
) -> None:
    ids = tokens(4, 16)
    kept, again = (
        gradients(student_of(teacher, ids), kind, ids, window, gradient_checkpointing=on) for on in (False, True)
    )
    assert_equal(kept, again)


def test_what_is_kept_for_the_way_back_is_little(teacher: Any, tokens: Tokens) -> None:
    ids = tokens(4, 16)
    student = student_of(teacher, ids)
    own = [layer.forward for layer in student.model.layers]

    def kept_bytes(on: bool) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gradients(copy.deepcopy(student), FinetuneStage, ids, gradient_checkpointing=on)
        return sum(sizes)

    assert kept_bytes(True) < kept_bytes(False) / 4
    gradients(student, FinetuneStage, ids, gradient_checkpointing=True)
    assert [layer.forward for layer in student.model.layers] == own
