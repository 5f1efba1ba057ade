"""Arithmetic that is counted from sizes, beside that which torch counts while tiny models run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lolcats
from families import FAMILIES
from lolcats.config import RunConfig
from lolcats.planning.flops import finetune_step, head_loss, teacher_step
from lolcats.planning.shapes import ModelShape, linearized, shape_of
from lolcats.planning.work import Work
from lolcats.training import FinetuneStage
from lolcats.training.batches import Batch

ROWS, LENGTH = 2, 16
TOKENS = ROWS * LENGTH
DENSE = ("llama", "qwen2", "phi3", "gemma2", "gpt_neox", "gpt2", "stablelm", "glm4")


def build(family: str, **changes: Any) -> Any:
    """See tests/modeling/conftest.py."""
    file = Path(__file__).parents[1] / "modeling" / "conftest.py"
    spec = importlib.util.spec_from_file_location("modeling_conftest", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build(family, **changes)


def settings(**parts: Any) -> RunConfig:
    layer = {"mixer": "hybrid", "window": 4} | parts.pop("linearization", {})
    return RunConfig.model_validate({"linearization": layer, "data": {"sequence_length": LENGTH}, **parts})


def shape(config: RunConfig, family: str, **changes: Any) -> ModelShape:
    with torch.device("meta"):
        model = build(family, **changes)
    return shape_of(linearized(model, config, in_place=True), config)


class Products(TorchDispatchMode):
    """Counts the operations of products with weights; attention and experts have others."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.total += 2 * out.numel() * args[-1].shape[0]
        return out


def matmuls(pieces: list[Work]) -> float:
    return sum(piece.flops for piece in pieces if piece.kind == "matmul")


@pytest.mark.parametrize("family", DENSE)
def test_a_forward_pass(family: str) -> None:
    changes, layers = FAMILIES[family]
    config = settings(linearization={"layers": list(layers)})
    told = shape(config, family, **changes)
    model = build(family, **changes)
    assert told.numbers == sum(p.numel() for p in model.parameters())
    with Products() as counted, torch.no_grad():
        model(torch.randint(3, 90, (ROWS, LENGTH)), use_cache=False)
    head = matmuls(head_loss(told, TOKENS, teacher=False)) / 2
    assert matmuls(teacher_step(told, ROWS, LENGTH)) + head == counted.total


def test_experts_count_where_tokens_pass() -> None:
    """Two of four, of three matrices each; torch has no count of grouped products."""
    changes, _ = FAMILIES["qwen3_moe"]
    dense = matmuls(teacher_step(shape(settings(), "qwen3", intermediate_size=2 * 24), ROWS, LENGTH))
    told = shape(settings(), "qwen3_moe", **changes)
    assert matmuls(teacher_step(told, ROWS, LENGTH)) == dense
    assert told.numbers == sum(p.numel() for p in build("qwen3_moe", **changes).parameters())


@pytest.mark.parametrize("kl", [0.0, 1.0])
def test_a_step_of_stage_two(kl: float) -> None:
    """Forward and backward of frozen weights and LoRA, the head, and the teacher's pass with KL.

    The input of the first layer needs no gradient, so what reads it has half of a backward pass, or none; and the loss
    leaves out the last token of a text. At the size of real models neither can be seen.
    """
    config = settings(finetune={"targets": "all", "rank": 2, "kl_factor": kl, "cross_entropy_factor": 1.0 - kl})
    told = shape(config, "llama")
    model = build("llama")
    lolcats.convert(model, config.linearization)
    stage = FinetuneStage(model, config.finetune)
    ids = torch.randint(3, 90, (ROWS, LENGTH))
    with Products() as counted:
        stage.backward(Batch(ids, torch.ones_like(ids, dtype=torch.bool), None, None), 1.0)
    reading = [m for m in told.layers[0].matrices if m.in_attention][:3]
    missing = sum(2 * TOKENS * (m.inputs * m.outputs + 2 * m.inputs) for m in reading)
    missing += matmuls(head_loss(told, TOKENS, teacher=kl > 0)) / LENGTH
    assert counted.total == matmuls(finetune_step(told, config, ROWS)) - missing
