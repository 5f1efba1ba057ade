"""A linearized model on disk, beside its tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

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
