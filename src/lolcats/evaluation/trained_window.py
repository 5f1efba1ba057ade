"""The control `trained_window` on disk: what a plain window learned in stage 2, beside the student that it is for.

MODEL/controls/trained_window/adapter_*           its LoRA, in peft's format
                              tensors.safetensors other parameters of the teacher that it changed, by name: all weights
                                                  after full fine-tuning
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.evaluation.variants import Enter
from lolcats.files import atomic_folder
from lolcats.training.window_control import WindowStage
from lolcats.variants import TRAINED_WINDOW

TENSORS = "tensors.safetensors"
ADAPTER = "adapter_config.json"


def window_folder(model: str | Path) -> Path:
    """Where the trained window of a model lies."""
    return Path(model, "controls", TRAINED_WINDOW)


def has_window(model: str | Path) -> bool:
    """Whether a model has one."""
    folder = window_folder(model)
    return (folder / ADAPTER).is_file() or (folder / TENSORS).is_file()


def why_left_out(model: str | Path) -> str:
    """What to say where it is asked for and not there."""
    return (
        f"{TRAINED_WINDOW} is left out: {window_folder(model)} is not there; linearize makes it where stage 2 is on "
        f"and evaluation.controls names {TRAINED_WINDOW}"
    )


def save_window(folder: Path, stage: WindowStage) -> None:
    """Write what a stage has learned.

    Raises:
        LolcatsError: the disk is full or the place cannot be written; nothing is left behind then.
    """
    tensors: Mapping[str, Tensor] = stage.parameters() if stage.adapter is None else {}
    with atomic_folder(folder) as temporary:
        if stage.adapter is not None:
            stage.adapter.save_pretrained(str(temporary))
        if tensors:
            ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            save_file(ready, temporary / TENSORS)


@torch.no_grad()
def read_window(teacher: PreTrainedModel, model: str | Path) -> Enter:
    """A context in which a teacher has the weights of the trained window of one of its students.

    LoRA is merged, as it is in the student; this takes the memory of the weights that carry it.

    Args:
        teacher: converted as the student is.
        model: the student's folder.

    Raises:
        LolcatsError: the files cannot be read, or are of another model.
    """
    folder, parameters = window_folder(model), dict(teacher.named_parameters())
    try:
        found = load_file(folder / TENSORS) if (folder / TENSORS).is_file() else {}
        found |= _merged(teacher, folder) if (folder / ADAPTER).is_file() else {}
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LolcatsError(f"cannot use the trained window in {folder}: {first}; delete it to go on without") from error
    for name, tensor in found.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise LolcatsError(f"{folder} is of another model: this one has no {name} of {tuple(tensor.shape)}")
    return partial(_in_place, {parameters[name]: tensor.to(parameters[name]) for name, tensor in found.items()})


def _merged(teacher: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The weights that carry LoRA, with it."""
    adapter = PeftModel.from_pretrained(teacher, str(folder))
    try:
        return {
            f"{name}.weight": layer.get_base_layer().weight + cast(Any, layer).get_delta_weight(adapter.active_adapter)
            for name, layer in teacher.named_modules()
            if isinstance(layer, LoraLayer)
        }
    finally:
        adapter.unload()


@contextmanager
def _in_place(tensors: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside, parameters hold other tensors."""
    kept = {parameter: parameter.data for parameter in tensors}
    try:
        for parameter, tensor in tensors.items():
            parameter.data = tensor
        yield
    finally:
        for parameter, tensor in kept.items():
            parameter.data = tensor
