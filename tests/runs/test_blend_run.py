"""Runs of the layer `blend`, from settings to a model that generates."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from lolcats import LolcatsError, linearize
from lolcats.config import RunConfig, load_config
from lolcats.evaluation.memory import text_memory
from lolcats.export import export_model, load_adapter
from lolcats.modeling import linearized_layers
from lolcats.runs.artefact import RECIPE_FILE


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
    # A number between two steps of the codes may be rounded to either, which a few tokens see.
    difference = (parts - whole[:, 17:]).abs()
    assert float(difference.max()) < 0.02 and float((difference > 1e-3).float().mean()) < 0.05


@pytest.mark.slow
def test_a_plain_window_has_no_first_stage(make_config: Callable[..., RunConfig]) -> None:
    folder = linearize(make_config("linearization.mixer=blend", "linearization.far=none"))
    results = folder.results()
    assert "transfer" not in results.perplexity and "linear_only" not in results.perplexity
    assert results.perplexity["student"] != results.perplexity["training_free"]  # LoRA has changed something
    assert results.perplexity["training_free"] is not None


SHARED = ("linearization.mixer=blend", "linearization.far=none", "linearization.kept.pairs=5",
          "linearization.kept.score=learned", "linearization.budget=heads")  # fmt: skip


@pytest.mark.slow
def test_a_run_finds_its_split_once(make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the results and in the model; the run goes on with it, and an adapter of it can be loaded."""
    config = make_config(*SHARED)
    folder = linearize(config, until="transfer")
    split = folder.results().split
    assert split is not None and folder.config().linearization == config.linearization
    monkeypatch.setattr("lolcats.modeling.budget.near_costs", lambda *_: pytest.fail("found again"))
    folder = linearize(config, resume=True)
    results = folder.results()
    assert results.split == split and results.complete and "equal_window" in results.perplexity
    model = AutoModelForCausalLM.from_pretrained(folder.model)
    assert model.config.linearization["split"] == split
    assert load_config(folder.model / RECIPE_FILE).linearization.model_dump()["split"] == split
    assert linearize(config, resume=True).results().split == split, "a finished run takes the command that made it"
    found = text_memory(model)
    assert found is not None and results.memory is not None and found.bytes == results.memory.bytes
    adapter = export_model(folder.path, folder.path.parent / "adapter", "adapter").folder
    loaded = load_adapter(adapter)[0]
    ids = torch.randint(3, 97, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(LolcatsError, match="budget"):
        linearize(config.model_copy(update={"linearization": make_config(*SHARED[:-1]).linearization}), resume=True)
