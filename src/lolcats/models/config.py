"""config.json of a pretrained model: read without running what it asks for, checked before memory is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from lolcats.errors import LolcatsError
from lolcats.printable import reason

SIZES = {
    "vocab_size": 10**7,
    "hidden_size": 2**18,
    "intermediate_size": 2**22,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
}
"""What every decoder has, and the largest number that is taken for more than a mistake."""
LARGEST = {"num_labels": 10**6, "num_experts": 10**4, "num_local_experts": 10**4, "n_routed_experts": 10**4}
"""Counts of which transformers makes lists or modules at once."""


def read_model_config(source: str) -> PretrainedConfig:
    """The configuration of a model in a folder or on the hub. No code of it is run.

    Raises:
        LolcatsError: there is none, it holds numbers that no model has, asks for code of its own, or describes
            weights that are quantized already.
    """
    file = Path(source) / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise LolcatsError(
            f"{file} is not JSON: {reason(error)}; copy it again from where the model came from"
        ) from error
    if not isinstance(raw, dict):
        raise LolcatsError(f"{file} must hold a JSON object of settings, got {type(raw).__name__}")
    check_numbers(raw, source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except LolcatsError:
        raise
    except Exception as error:  # whatever the family's class makes of a foreign file
        if "trust_remote_code" in str(error) or "auto_map" in raw:
            raise LolcatsError(
                f"{source} asks to run code of its own (auto_map in its config.json), which lolcats never does; "
                f"its model_type is {raw.get('model_type', 'unknown to transformers')!r:.80}; "
                "expected a model that transformers knows"
            ) from error
        places = (
            "" if raw else "expected a hub name, a folder with config.json and safetensors, a .gguf file or 'demo'; "
        )
        what = f"its configuration cannot be read: {type(error).__name__}: {reason(error)}"
        raise LolcatsError(f"cannot load {source!r}: {places}{what}") from error
    check_config(config, source)
    return config


def check_config(config: PretrainedConfig, source: str) -> None:
    """Refuse sizes that no model has, or that contradict each other or the weights, and quantized weights.

    Raises:
        LolcatsError: such a configuration; the message names the key.
    """
    text = config.get_text_config(decoder=True)
    # Some families call these by other names; attributes go by the common one.
    numbers = {name: getattr(text, name, None) for name in SIZES}
    check_numbers({name: number for name, number in numbers.items() if number is not None}, source)
    heads, kv_heads, layers = (
        numbers[f"num_{part}"] for part in ("attention_heads", "key_value_heads", "hidden_layers")
    )
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        raise LolcatsError(
            f"the configuration of {source}: num_key_value_heads {kv_heads} must divide num_attention_heads {heads}"
        )
    kinds = getattr(text, "layer_types", None)
    if kinds is not None and layers is not None and len(kinds) != layers:
        raise LolcatsError(
            f"the configuration of {source}: layer_types names {len(kinds)} layers and num_hidden_layers is {layers}"
        )
    if not isinstance(getattr(config, "dtype", None), torch.dtype | None):
        raise LolcatsError(f"the configuration of {source}: dtype {config.dtype!r:.80} is no number format of torch")
    _check_quantization(config, source)
    _check_against_files(numbers, source)


def check_numbers(settings: dict[str, Any], source: str, prefix: str = "") -> None:
    """Refuse sizes that no model has, in a JSON object and the objects in it.

    Raises:
        LolcatsError: such a number; the message names the key.
    """
    for key, value in settings.items():
        if isinstance(value, dict):
            check_numbers(value, source, f"{prefix}{key}.")
        if key in SIZES and value is not None and not isinstance(value, list | dict):  # a list has one a layer
            if type(value) is not int or not 1 <= value <= SIZES[key]:
                raise LolcatsError(
                    f"the configuration of {source}: {prefix}{key} must be a whole number from 1 to {SIZES[key]:,}; "
                    f"got {value!r:.80}"
                )
        elif key in LARGEST and type(value) is int and value > LARGEST[key]:
            raise LolcatsError(f"the configuration of {source}: {prefix}{key} is too large for a model: {value!r:.80}")


def _check_quantization(config: PretrainedConfig, source: str) -> None:
    entry = getattr(config, "quantization_config", None)
    if entry is None:
        return
    method = entry.get("quant_method") if isinstance(entry, dict) else getattr(entry, "quant_method", None)
    raise LolcatsError(
        f"the weights of {source} are quantized already (quantization_config in its config.json, method "
        f"{str(getattr(method, 'value', method))!r:.40}); expected ordinary ones: give the model that they were made "
        "of (lolcats quantizes it itself: quantization=8bit or 4bit), or write them out with model.dequantize() and "
        "model.save_pretrained(FOLDER)"
    )


def _check_against_files(numbers: dict[str, Any], source: str) -> None:
    """Refuse matrices larger than all the weights there are, before memory is taken for them."""
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    hidden = numbers["hidden_size"]
    if not files or not isinstance(hidden, int):
        return
    held = sum(_count(file) for file in files)
    for name in ("vocab_size", "intermediate_size", "hidden_size"):
        rows = numbers[name]
        if isinstance(rows, int) and rows * hidden > 2 * max(held, 2**24):  # small models fit whatever they claim
            raise LolcatsError(
                f"the configuration of {source}: {name} {rows:,} and hidden_size {hidden:,} make a matrix of "
                f"{rows * hidden:,} numbers, but its files hold {held:,} in all; they do not belong together"
            )


def _count(file: Path) -> int:
    """Numbers in a file of tensors, by its header."""
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError) as error:
        raise LolcatsError(
            f"cannot load {str(file)!r}: it is damaged or incomplete ({reason(error)}); copy it again"
        ) from error
    return sum(int(torch.Size(shape).numel()) for shape in shapes)
