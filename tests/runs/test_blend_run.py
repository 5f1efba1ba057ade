"""Runs of the layer `blend`, from settings to a model that generates."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from lolcats import linearize
from lolcats.config import RunConfig
from lolcats.evaluation.memory import text_memory
from lolcats.modeling import linearized_layers


@pytest.mark.slow
def test_a_run_with_kept_pairs(make_config: Callable[..., RunConfig]) -> None:
    """The score is trained beside the transfer, and the model reads a prompt as it was trained to."""
    folder = linearize(make_config("linearization.mixer=blend", "linearization.kept.pairs=5", "linearization.bits=8"))
    results = folder.results()
    assert {"teacher", "equal_window", "transfer", "student", "near_only", "linear_only"} <= set(results.perplexity)
    assert results.memory is not None and set(results.memory.layers[0].parts) == {"sinks", "window", "kept", "state"}
    model = AutoModelForCausalLM.from_pretrained(folder.model).eval()
    found = text_memory(model)
    assert found is not None and found.kv_tokens == results.memory.kv_tokens
    scores = [layer.mixer.score for layer in linearized_layers(model)]
    losses = [line["validation_loss"] for line in map(json.loads, folder.metrics_file.read_text().splitlines())
              if line["stage"] == "transfer" and "validation_loss" in line]  # fmt: skip
    assert all(score is not None for score in scores) and losses[-1] < losses[0]
    ids = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = model(ids[:, :17], use_cache=True).past_key_values
        parts = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(17, 30)], 1)
    torch.testing.assert_close(parts, whole[:, 17:], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_plain_window_has_no_first_stage(make_config: Callable[..., RunConfig]) -> None:
    folder = linearize(make_config("linearization.mixer=blend", "linearization.far=none"))
    results = folder.results()
    assert "transfer" not in results.perplexity and "linear_only" not in results.perplexity
    assert results.perplexity["student"] != results.perplexity["training_free"]  # LoRA has changed something
    assert results.perplexity["training_free"] is not None
