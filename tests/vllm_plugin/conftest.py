"""Tiny linearized models for vLLM. Without vLLM nothing here is collected: `make test-vllm` makes its environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lolcats import LinearizationConfig, convert
from lolcats.serving.vllm_plugin import installed_version
from tiny import chat_tokenizer, perturb

collect_ignore_glob: list[str] = []
if installed_version() is None:
    collect_ignore_glob.append("test_*.py")
else:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }


def pytest_configure(config: pytest.Config) -> None:
    if installed_version() is not None:
        config.addinivalue_line("filterwarnings", "ignore")  # vLLM's own, until the last socket


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers with its tokenizer; heads have a size that vLLM's own attention takes."""
    folder, tokenizer = tmp_path_factory.mktemp("teacher"), chat_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.3, max_position_embeddings=1024, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def linearized(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the folder of a linearized model, whose own parameters are away from their start."""

    def make(source: Path | None = None, **settings: Any) -> Path:
        source = source or teacher
        folder = tmp_path_factory.mktemp("student")
        model = AutoModelForCausalLM.from_pretrained(source)
        torch.manual_seed(1)
        convert(model, LinearizationConfig(**settings), input_ids=torch.randint(1, 250, (1, 256)))
        perturb(model).save_pretrained(folder)
        for file in source.glob("*tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())
        if (template := source / "chat_template.jinja").is_file():
            (folder / template.name).write_bytes(template.read_bytes())
        return folder

    return make
