"""Whether a saved model is whole: all tensors that its configuration asks for, none besides, and numbers in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.export.contents import weight_files
from lolcats.modeling import linearized_layers
from lolcats.models.weights import all_finite, check_complete
from lolcats.printable import reason


def check_model(folder: Path) -> None:
    """Refuse a model that could not be loaded as it is. Its tensors are read one by one, and not kept.

    Raises:
        LolcatsError: the folder holds no linearized model, or tensors are missing, foreign, of another shape or not
            numbers; the message names the first of them.
    """
    for file in weight_files(folder):
        _check_numbers(file)
    model, found = _load_shapes(folder)
    if not linearized_layers(model):
        raise LolcatsError(f"{folder} holds no linearized model; expected a folder that lolcats linearize wrote")
    check_complete(found, str(folder))


def _load_shapes(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model without memory for its weights, and what transformers says about their names and shapes."""
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else the names are in the log only
            trust_remote_code=False,
        )
    except LolcatsError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise LolcatsError(f"{folder} cannot be loaded, so it is not exported: {reason(error)}") from error
    return cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)


def _check_numbers(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                check_finite(name, tensors.get_tensor(name), file)
    except (OSError, SafetensorError) as error:
        raise LolcatsError(f"cannot read {file}: {error}") from error


def check_finite(name: str, tensor: torch.Tensor, file: Path) -> None:
    """Raise LolcatsError where a tensor has values that are not finite numbers."""
    if tensor.is_floating_point() and not all_finite(tensor):
        raise LolcatsError(f"{file}: {name} has values that are not finite (NaN or infinite); train it anew")
