"""Models that are kept in several places: devices, main memory, disk.

A part that accelerate placed has a hook (`_hf_hook`) that brings its inputs, and weights that are kept elsewhere, to
where it computes; between calls these weights are on the meta device. A sharded part (`models.sharded`) has its weights
brought to the device of its mesh.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def hooks_of(module: nn.Module) -> list[Any]:
    """What accelerate has put on a module."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def is_spread(model: nn.Module) -> bool:
    """Whether a model has its weights in several places."""
    return any(hooks_of(module) for module in model.modules())


def computes_on(module: nn.Module) -> torch.device | None:
    """Where a module computes by its hook, or its weights that are sharded; None where it has none.

    Shards may wait in the memory of the CPU, which is not where they are used.
    """
    places = [hook.execution_device for hook in hooks_of(module) if getattr(hook, "execution_device", None) is not None]
    if places:
        return torch.device(places[0])
    meshes = [mesh for p in module.parameters() if (mesh := getattr(p, "device_mesh", None)) is not None]
    return _of_mesh(meshes[0]) if meshes else None


def _of_mesh(mesh: Any) -> torch.device:
    """This process's device in a mesh of processes."""
    kind = mesh.device_type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def main_device(model: Any) -> torch.device:
    """Where the inputs of a model belong; `model.device` is the meta device where the first weights are offloaded."""
    return computes_on(model) or model.device


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers by name; those that are kept elsewhere are read one by one."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name, kept_value(model, name) if tensor.is_meta else tensor


def kept_value(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer from where it is kept; itself where it is nowhere else."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    maps = [hook.weights_map for hook in hooks_of(module) if getattr(hook, "weights_map", None) is not None]
    return maps[0][own] if maps else getattr(module, own)
