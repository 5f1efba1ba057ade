"""Number formats, devices, and the compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lolcats.modeling import linearized_layers


def test_half_precision(model: Any, inputs: Any, folder: str) -> None:
    """What the linearization added stays float32."""
    exact = model(**inputs).logits
    low: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert (low(**inputs).logits - exact).abs().max() < 0.05 * exact.abs().max()
    low = AutoModelForCausalLM.from_pretrained(folder).half()
    assert (low(**inputs).logits - exact).abs().max() < 0.01 * exact.abs().max()
    assert low.dtype == torch.float16
    for layer in linearized_layers(low):
        assert {p.dtype for p in layer.mixer.parameters()} == {torch.float32}
        assert {p.dtype for p in layer.inner.parameters()} == {torch.float16}
    assert low.generate(**inputs, max_new_tokens=5).shape[1] == inputs["input_ids"].shape[1] + 5


def test_dtypes_are_the_same_however_they_are_asked_for(folder: str) -> None:
    halved: Any = AutoModelForCausalLM.from_pretrained(folder).half()
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    assert [p.dtype for p in loaded.parameters()] == [p.dtype for p in halved.parameters()]
    moved = loaded.to("cpu", torch.float64)
    assert {p.dtype for p in moved.parameters()} == {torch.float64}


def test_device_map(model: Any, inputs: Any, folder: str) -> None:
    expected = model(**inputs).logits
    options: dict[str, Any]
    for options in ({"device_map": "auto"}, {"device_map": {"": "cpu"}, "dtype": "auto"}, {"low_cpu_mem_usage": True}):
        placed: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
        assert torch.equal(placed(**inputs).logits, expected)
    assert torch.equal(model.to("cpu")(**inputs).logits, expected)


@pytest.mark.slow
# torch's compiler makes an instance of an autograd function to trace it.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("quick_compiler")
def test_compile(model: Any, inputs: Any) -> None:
    compiled = torch.compile(model)
    with torch.no_grad():
        difference = compiled(**inputs, use_cache=False).logits - model(**inputs, use_cache=False).logits
    assert difference.abs().max() < 1e-4


@pytest.mark.slow
def test_larger_than_memory(model: Any, inputs: Any, folder: str) -> None:
    """Layers that do not fit are read from disk when they are needed."""
    device_map: dict[str, str] = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    device_map |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(model.config.num_hidden_layers)}
    placed: Any = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder="offload")
    assert torch.equal(placed(**inputs).logits, model(**inputs).logits)
    text = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    assert torch.equal(placed.generate(**inputs, do_sample=False, max_new_tokens=8), text)
