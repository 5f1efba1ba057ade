"""Teachers in 8 and 4 bits by bitsandbytes: both stages train on them, and the artefact has ordinary weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import lolcats.models.quantization
from lolcats import LinearizationConfig, LolcatsError, convert, load_teacher
from lolcats.config import FinetuneConfig, TransferConfig, load_config
from lolcats.errors import ConfigError
from lolcats.models.quantization import dequantize_below, is_quantized, quantization_config
from lolcats.training import FinetuneStage, TransferStage
from lolcats.training.batches import Batch

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes and peft warn of roundings that are tested here
KINDS = ["8bit", "4bit"]
ROUNDING = {"8bit": 0.25, "4bit": 1e-3}
"""Of all gradients together: int8 products round their inputs too (0.04 to 0.1 here); without a gradient it is 1."""


@pytest.fixture
def folder(teacher: LlamaForCausalLM, tmp_path: Path, tiny_tokenizer: Any) -> str:
    teacher.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def make_batch() -> Batch:
    ids = torch.randint(0, 30, (2, 24), generator=torch.Generator().manual_seed(0))
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), None, None)


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_stage_one_trains_and_touches_no_weight(folder: str, kind: Any) -> None:
    model, _ = load_teacher(folder, torch.float32, quantization=kind)
    assert is_quantized(model)
    convert(model, LinearizationConfig(window=4))
    stage = TransferStage(model, TransferConfig())
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n not in stage.parameters()}
    optimizer = torch.optim.AdamW(list(stage.parameters().values()), lr=1e-2)
    losses = []
    for _ in range(15):
        losses.append(float(stage.backward(make_batch(), 1.0)["loss"]))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.99 * losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in before.items())


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_quantized_weights_is_lora_on_their_values(folder: str, kind: Any) -> None:
    """Same loss and gradients as on the weights written out."""
    torch.manual_seed(0)
    model, _ = load_teacher(folder, torch.float32, quantization=kind)
    convert(model, LinearizationConfig(window=4))
    stage = FinetuneStage(model, FinetuneConfig(kl_factor=1.0, targets="all"))
    for name, p in stage.parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    loss = float(stage.backward(make_batch(), 1.0)["loss"])
    gradients = {n: p.grad.clone() for n, p in stage.parameters().items() if p.grad is not None}
    assert stage.adapter is not None and gradients.keys() == stage.parameters().keys()
    stage.adapter = dequantize_below(stage.adapter, torch.float32)
    assert not is_quantized(model) and not hasattr(model.config, "quantization_config")
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    assert float(stage.backward(make_batch(), 1.0)["loss"]) == pytest.approx(loss, rel=5e-3)
    expected = {n: p.grad for n, p in model.named_parameters() if n in gradients and p.grad is not None}
    assert expected.keys() == gradients.keys() and all(g.any() for g in gradients.values())
    joined = torch.cat([g.flatten() for g in expected.values()])
    difference = joined - torch.cat([gradients[n].flatten() for n in expected])
    assert difference.norm() <= ROUNDING[kind] * joined.norm()
    before = model(make_batch().input_ids).logits
    stage.finish()
    torch.testing.assert_close(model(make_batch().input_ids).logits, before, rtol=1e-4, atol=1e-4)


@needs_bitsandbytes
@pytest.mark.exhaustive
def test_a_gguf_teacher_can_be_quantized() -> None:
    model, _ = load_teacher("demo", torch.float32, quantization="8bit")
    assert is_quantized(model)


def test_without_the_package(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lolcats.models.quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LolcatsError, match=r"4bit needs the package bitsandbytes: pip install"):
        load_teacher(folder, quantization="4bit")
    with pytest.raises(LolcatsError, match="8bit"):
        quantization_config("8bit", None)


def test_full_fine_tuning_is_refused() -> None:
    with pytest.raises(ConfigError, match="full cannot train weights of 4bit"):
        load_config(None, ["quantization=4bit", "finetune.method=full"])
