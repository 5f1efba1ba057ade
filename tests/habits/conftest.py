"""A linearized model on disk, beside its tokenizer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def folder(
    make_teacher: Callable[..., LlamaForCausalLM],
    make_student: Callable[..., Any],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> str:
    """A tiny random linearized Llama with window 6 and 2 sinks, so that every prompt is longer than what it sees."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    teacher = make_teacher(vocab_size=len(tokenizer), eos_token_id=None, bos_token_id=None)
    make_student(teacher, window=6, sinks=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(folder: str) -> Any:
    """As users get it; longer texts than its window and sinks are what the habits are tried on."""
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def inputs(tokenizer: Any) -> Any:
    inputs = tokenizer("The river runs through", return_tensors="pt")
    assert inputs["input_ids"].shape[1] > 8  # window and sinks
    return inputs


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` traces and differentiates, but no C++ is compiled, which takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
