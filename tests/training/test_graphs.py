"""Steps that a CUDA graph can hold: they ask the device nothing, and replayed they give what they give eagerly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from lolcats import LinearizationConfig, convert
from lolcats.config import FinetuneConfig, TransferConfig
from lolcats.training import FinetuneStage, TransferStage
from lolcats.training.batches import Batch
from lolcats.training.graphs import EAGER_STEPS, GraphedStage, one_text_a_row

ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
"""Operations whose result the host waits for."""


class Questions(TorchDispatchMode):
    """Notes the operations that ask the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ASKING):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def make_stage(teacher: LlamaForCausalLM, name: str) -> TransferStage | FinetuneStage:
    if name == "parts":
        layer = LinearizationConfig(mixer="blend", window=4, sinks=1, kept={"pairs": 3})
        return TransferStage(convert(teacher, layer), TransferConfig(target="parts"))
    model = convert(teacher, LinearizationConfig(window=4, sinks=1))
    if name == "transfer":
        return TransferStage(model, TransferConfig())
    weight = {"finetune": 1.0, "weighted": 0.5, "far tokens": 0.0}[name]
    return FinetuneStage(model, FinetuneConfig(kl_factor=1.0, train_feature_maps=True, near_weight=weight))


def make_batch(device: str, seed: int = 0) -> Batch:
    ids = torch.randint(0, 30, (2, 40), generator=torch.Generator().manual_seed(seed)).to(device)
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), None, None)


@pytest.mark.parametrize("name", ["transfer", "parts", "finetune", "weighted", "far tokens"])
def test_a_step_asks_the_device_nothing(teacher: LlamaForCausalLM, name: str) -> None:
    stage = make_stage(teacher, name)
    stage.backward(make_batch("cpu"), 1.0)  # the first step may: it finds the family's rotation, say
    with one_text_a_row(), Questions() as questions:
        stage.backward(make_batch("cpu"), torch.tensor(1.0))
    assert questions.found == []


def test_what_is_told_to_transformers_is_taken_back(teacher: LlamaForCausalLM) -> None:
    stage = make_stage(teacher, "transfer")
    with one_text_a_row():
        pass
    with Questions() as questions:
        stage.backward(make_batch("cpu"), 1.0)
    assert questions.found  # transformers looks for packed rows again


@pytest.mark.parametrize("name", ["transfer", "finetune"])
def test_on_a_cpu_the_stage_runs_as_ever(teacher: LlamaForCausalLM, name: str) -> None:
    stage = GraphedStage(make_stage(teacher, name))
    losses = [stage.backward(make_batch("cpu"), 1.0)["loss"] for _ in range(EAGER_STEPS + 2)]
    assert all(bool(loss.isfinite()) for loss in losses) and stage.count(make_batch("cpu")) > 0
    assert torch.equal(stage.validate(make_batch("cpu"))["loss"], stage.validate(make_batch("cpu"))["loss"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["transfer", "finetune"])
def test_replayed_steps_are_eager_steps(teacher: LlamaForCausalLM, name: str) -> None:
    stage = make_stage(teacher.to("cuda"), name)  # type: ignore[arg-type]
    graphed = GraphedStage(stage)
    for seed in range(EAGER_STEPS + 3):
        batch = make_batch("cuda", seed)
        want = stage.backward(batch, 0.5)
        gradients = {n: p.grad.clone() for n, p in stage.parameters().items() if p.grad is not None}
        for p in stage.parameters().values():
            p.grad = None
        got = graphed.backward(batch, 0.5)
        torch.testing.assert_close(got["loss"], want["loss"])
        for n, p in stage.parameters().items():
            if n in gradients:
                torch.testing.assert_close(p.grad, gradients[n], rtol=1e-3, atol=1e-5)
            p.grad = None
    assert graphed._recording is not None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["transfer", "finetune"])
def test_another_window_is_not_replayed(teacher: LlamaForCausalLM, name: str) -> None:
    graphed = GraphedStage(make_stage(teacher.to("cuda"), name))  # type: ignore[arg-type]
    for seed in range(EAGER_STEPS + 1):
        graphed.backward(make_batch("cuda", seed), 0.5)
    assert graphed._recording is not None
    batch = make_batch("cuda", 9)
    own = [graphed.backward(batch, 0.5)["loss"] for _ in range(2)]
    with graphed.windowed(16):
        found = graphed.backward(batch, 0.5)["loss"]
        with graphed.stage.windowed(16):
            torch.testing.assert_close(found, graphed.stage.backward(batch, 0.5)["loss"])
    torch.testing.assert_close(own[0], own[1])
    torch.testing.assert_close(graphed.backward(batch, 0.5)["loss"], own[0])
    assert float((found - own[0]).abs()) > 1e-3
