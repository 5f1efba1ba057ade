"""Training on with the libraries that people train with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from lolcats import LinearizationConfig, LolcatsError, convert
from lolcats.modeling import linearized_layers


def test_trainer(model: Any, tokenizer: Any, inputs: Any) -> None:
    lines: Any = [tokenizer("The old mill still turns beside the river.")] * 16
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            "trained", max_steps=8, learning_rate=5e-3, logging_steps=1, save_steps=8, use_cpu=True, report_to="none"
        ),
        train_dataset=lines,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    before = [p.detach().clone() for p in added(model)]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    checkpoint: Any = AutoModelForCausalLM.from_pretrained("trained/checkpoint-8")
    assert torch.equal(checkpoint(**inputs).logits, model.eval()(**inputs).logits)
    assert not any(torch.equal(a, b) for a, b in zip(before, added(model), strict=True))


def added(model: Any) -> list[torch.nn.Parameter]:
    """The parameters of the linearization."""
    return [p for layer in linearized_layers(model) for p in layer.mixer.parameters()]


def test_lora(model: Any, inputs: Any, folder: str) -> None:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    for _ in range(3):
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = adapted.eval()(**inputs).logits
    adapted.save_pretrained("adapter")

    fresh: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.allclose(fresh(**inputs).logits, expected)
    loaded = PeftModel.from_pretrained(fresh, "adapter")
    assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-4)
    merged: Any = loaded.merge_and_unload()
    assert torch.allclose(merged(**inputs).logits, expected, atol=1e-4)
    merged.save_pretrained("merged")
    again: Any = AutoModelForCausalLM.from_pretrained("merged")
    assert torch.equal(again(**inputs).logits, merged(**inputs).logits)


def test_lora_needs_target_modules(model: Any) -> None:
    """peft has defaults for the families that it knows."""
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(model, LoraConfig(r=4))


def test_convert_refuses_an_adapter(teacher: Any) -> None:
    """It is merged first."""
    get_peft_model(teacher, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(LolcatsError, match="merge"):
        convert(teacher, LinearizationConfig(window=4))


def test_accelerate(model: Any, inputs: Any) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    losses = []
    for _ in range(3):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    accelerator.unwrap_model(model).save_pretrained("accelerated")


# The old name is what people write, and the only one that older releases have.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing(model: Any, inputs: Any) -> None:
    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.train()
    model.gradient_checkpointing_enable()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, gradients(), strict=True))
