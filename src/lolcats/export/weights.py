"""Whether a saved model is whole: all tensors that its configuration asks for, none besides, and numbers in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.modeling import linearized_layers
from lolcats.modeling.old_names import new_name
from lolcats.models.empty import empty_model
from lolcats.models.shards import check_finite, entries_of, read_entries, weight_files, write_shards
from lolcats.models.weights import check_complete
from lolcats.printable import reason
from lolcats.runs.assembled import cast_entries


def check_model(folder: Path) -> None:
    """Refuse a model that could not be loaded as it is. Its tensors are read piece by piece, and not kept.

    Raises:
        LolcatsError: the folder holds no linearized model, or tensors are missing, foreign, of another shape or not
            numbers; the message names the first of them.
    """
    for file in weight_files(folder):
        for name, entry in read_entries(file).items():
            check_finite(name, entry, file)
    check_loads(folder)


def check_loads(folder: Path) -> None:
    """The same by the names and shapes of the tensors alone; raises as `check_model` does."""
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


def write_weights(model: Path, folder: Path, dtype: torch.dtype | None, shard_bytes: int) -> None:
    """Write the weights of a saved model anew, in another format or in files of another size.

    Args:
        model: its folder.
        folder: of the new files.
        dtype: None keeps that of each tensor; what the linearization added always does.
        shard_bytes: of a file.

    Raises:
        LolcatsError: a tensor cannot be read, or has no finite numbers in the new format; or the disk lacks the room.
    """
    entries = {new_name(name): entry for name, entry in entries_of(weight_files(model)).items()}
    if dtype is not None:
        entries = cast_entries(empty_model(AutoConfig.from_pretrained(model)), entries, dtype)
    write_shards(folder, entries, shard_bytes)
