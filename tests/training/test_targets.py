"""What stage 1 compares: the layer's output, its far half's, or direction and share of the far half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from lolcats import LolcatsError
from lolcats.config import LinearizationConfig, RunConfig, TransferConfig
from lolcats.mixers import MIXERS, Sizes, build_mixer
from lolcats.modeling import linearized_layers
from lolcats.training import TrainingData, TransferStage, transfer_attention
from lolcats.training.batches import Batch, make_batch

Students = Callable[..., Any]
Tokens = Callable[..., Tensor]


def config(**changes: Any) -> TransferConfig:
    settings: dict[str, Any] = {
        "tokens": 20 * 4 * 30,
        "batch_size": 4,
        "warmup_steps": 0,
        "lr": 0.03,
        "validate_every": 10,
    }
    return TransferConfig(**(settings | changes))


def batch_of(ids: Tensor) -> Batch:
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), None, None)


def trained(stage: TransferStage, ids: Tensor) -> set[str]:
    """Kinds of parameters that a step gives a gradient to."""
    stage.backward(batch_of(ids), 1.0)
    found = {n: p.grad for n, p in stage.parameters().items()}
    return {n.rpartition("mixer.")[2].partition(".")[0] for n, g in found.items() if g is not None and bool(g.any())}


@torch.no_grad()
def observed(student: Any, ids: Tensor, look: Callable[..., Tensor]) -> Tensor:
    """What `look` finds at each layer, its call and its teacher's output."""
    found: list[Tensor] = []
    for layer in linearized_layers(student):
        layer.observer = lambda *args: found.append(look(*args))
    student(ids, use_cache=False)
    for layer in linearized_layers(student):
        layer.observer = None
    return torch.stack(found)


@pytest.mark.parametrize(
    ("target", "expected"),
    [("hybrid", {"far", "share", "score"}), ("far", {"far", "score"}), ("parts", {"far", "share", "score"})],
)
def test_what_each_target_trains_of_blend(
    make_student: Students, tokens: Tokens, target: str, expected: set[str]
) -> None:
    student = make_student(mixer="blend", window=4, sinks=1, kept={"pairs": 2})
    assert trained(TransferStage(student, config(target=target)), tokens()) == expected


@pytest.mark.parametrize("mixer", ["hybrid", "blend"])
@pytest.mark.parametrize(("new", "old"), [("full", "hybrid"), ("far", "linear")])
def test_both_spellings_are_one_target(make_student: Students, tokens: Tokens, mixer: str, new: Any, old: Any) -> None:
    student = make_student(mixer=mixer, window=4)
    found = [TransferStage(student, config(target=name)).validate(batch_of(tokens()))["loss"] for name in (new, old)]
    assert torch.equal(*found)


@torch.no_grad()
def test_the_far_half_of_blend_alone_is_compared_with_all_of_the_teacher(
    make_student: Students, tokens: Tokens
) -> None:
    student = make_student(mixer="blend", window=4)
    got = TransferStage(student, config(target="far")).validate(batch_of(tokens()))["layers"]
    expected = observed(
        student, tokens(), lambda layer, call, y: (layer.mixer(call, mode="linear_only")[0] - y).square().mean()
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kept", [{}, {"pairs": 3}], ids=str)
def test_parts_are_direction_and_share(make_student: Students, tokens: Tokens, kept: dict[str, Any]) -> None:
    """The loss is 1000 times the direction's error and the share's; documents are apart, padding does not count."""
    student, ids = make_student(mixer="blend", window=3, sinks=1, kept=kept), tokens(1, 20)
    stage = TransferStage(student, config(target="parts"))
    found = stage.validate(batch_of(ids))
    side = observed(student, ids, lambda layer, call, _: layer.mixer.side_loss(call)).mean() if kept else 0.0
    expected = 1000 * float(found["mse"]) + float(found["share"]) + float(side)
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(found["share"]) > 0 and found["layers"].shape == (3,)


def test_parts_of_packed_documents(make_student: Students, packed: Callable[..., Any], tokens: Tokens) -> None:
    ids = tokens(1, 20)
    stage = TransferStage(make_student(mixer="blend", window=3, sinks=1), config(target="parts"))
    data = packed(ids.numpy(), np.array([[0] * 7 + [1] * 9 + [-1] * 4]))
    together = stage.validate(make_batch(data, np.arange(1), "cpu", keep_apart=True))
    alone = [stage.validate(batch_of(part)) for part in ids[:, :16].split([7, 9], 1)]
    for name in ("mse", "share", "loss"):
        torch.testing.assert_close(together[name], (7 * alone[0][name] + 9 * alone[1][name]) / 16, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_each_target_is_best_at_what_it_compares(make_student: Students, training_data: TrainingData) -> None:
    """After the same steps: output, far half, direction and share are nearest where the target asks for them."""
    errors: dict[str, dict[str, float]] = {}
    batch = batch_of(torch.from_numpy(training_data.train.ids).long())
    data = TrainingData(training_data.train, training_data.train)
    for target in ("full", "far", "parts"):
        student = make_student(mixer="blend", window=4, sinks=1)
        transfer_attention(student, data, config(target=target))
        found = {name: TransferStage(student, config(target=name)).validate(batch) for name in ("full", "far", "parts")}
        errors[target] = {
            **{name: float(found[name]["mse"]) for name in ("full", "far")},
            "direction": float(found["parts"]["mse"]),
            "share": float(found["parts"]["share"]),
        }
    best = {name: min(errors, key=lambda target: errors[target][name]) for name in errors["full"]}
    assert best == {"full": "full", "far": "far", "direction": "parts", "share": "parts"}
    assert (
        errors["far"]["far"] < 0.95 * errors["full"]["far"] and errors["parts"]["share"] < 0.8 * errors["full"]["share"]
    )


@pytest.mark.parametrize(
    ("layer", "stage", "words"),
    [
        ({"mixer": "hybrid"}, {"target": "parts"}, "hybrid has none; expected one of full, far"),
        ({"mixer": "blend", "far": "none"}, {"target": "far"}, "blend, far none has none; expected one of full"),
        ({}, {"target": "far", "random_window": [16, 32]}, "leave them out"),
        ({"mixer": "blend"}, {"target": "parts", "xent_factor": 1.0}, "set it to 0"),
        ({}, {"random_window": [17, 31]}, "multiple of 16"),
        ({}, {"random_window": [0, 15]}, "multiple of 16"),
        ({}, {"random_window": [64, 32]}, "multiple of 16"),
        ({}, {"window_dropout": [0.5, 1.5]}, "less than or equal to 1"),
        ({}, {"window_dropout": 0.5, "compile": True}, "set compile to auto"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_one_line(layer: dict[str, Any], stage: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words) as error:
        RunConfig.model_validate({"linearization": layer, "transfer": stage})
    assert all("\n" not in problem["msg"] for problem in error.value.errors())


def test_a_stage_that_is_off_may_say_anything() -> None:
    RunConfig.model_validate({"transfer": {"enabled": False, "target": "parts"}})


def test_a_target_that_a_layer_lacks_is_refused_in_python_too(make_student: Students) -> None:
    with pytest.raises(LolcatsError, match="expected one of full, far; got 'parts'"):
        TransferStage(make_student(window=4), config(target="parts"))


@pytest.mark.parametrize(
    "settings", [{}, *({"mixer": "blend", "far": far} for far in ("linear", "none", "kda"))], ids=str
)
def test_settings_and_layers_name_the_same_targets(settings: dict[str, Any]) -> None:
    layer = LinearizationConfig(**settings)
    mixer = build_mixer(layer.mixer, Sizes(4, 2, 6, 6, 10), **layer.values())
    assert mixer.targets == layer.targets and isinstance(mixer, MIXERS[layer.mixer])
