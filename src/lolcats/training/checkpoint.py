"""Checkpoints: one safetensors file with everything that an exact continuation needs, written atomically."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lolcats.errors import LolcatsError
from lolcats.files import atomic_file
from lolcats.modeling.old_names import renamed
from lolcats.models.sharded import is_shard, local_part, own_rows
from lolcats.training.shards import find_shards, read_shards

FORMAT = "lolcats-checkpoint-1"
SLOTS = {"step", "exp_avg", "exp_avg_sq"}
"""What AdamW keeps of each parameter."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to `path`; an interruption or a full disk leaves the old file as it was."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LolcatsError(f"cannot write {path}: {error.strerror or error}") from error
    ready = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    content = json.dumps({**metadata, "tensors": len(ready)})
    with atomic_file(path, apart=True) as temporary:
        save_file(ready, temporary, metadata={"format": FORMAT, "content": content})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        LolcatsError: the file is missing, truncated or not a lolcats checkpoint.
    """
    with _opened(path) as (file, metadata):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        return renamed(tensors), metadata  # runs of version 0.1 go on


def read_metadata(path: Path) -> dict[str, Any]:
    """Only the metadata of what `save_tensors` wrote, its `step` among them; raises as `load_tensors` does."""
    with _opened(path) as (_, metadata):
        return metadata


def damaged(path: Path, what: object) -> LolcatsError:
    """The error for a checkpoint that cannot be used, with what to do."""
    return LolcatsError(
        f"cannot read the checkpoint {path}: {what}; delete its folder {path.parent} to start this stage anew"
    )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A checkpoint and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            held = file.metadata() or {}
            if held.get("format") != FORMAT:
                raise LolcatsError(
                    f"{path} is not a checkpoint of lolcats (format {held.get('format')!r}); "
                    f"delete its folder {path.parent} to start this stage anew"
                )
            metadata = _read_content(path, held.get("content"))
            if metadata.get("tensors", len(file.keys())) != len(file.keys()):
                raise damaged(path, f"it holds {len(file.keys())} tensors of {metadata['tensors']}")
            yield file, metadata
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error


def _read_content(path: Path, content: str | None) -> dict[str, Any]:
    try:
        metadata = json.loads(content or "")
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its metadata is not JSON ({error})") from error
    if not isinstance(metadata, dict) or type(metadata.get("step")) is not int or metadata["step"] < 0:
        raise damaged(path, "its metadata does not say its step")
    return metadata


def training_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, optimizer state and random number generators as named tensors."""
    tensors = parameter_tensors(parameters)
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer:{key}:{name}"] = torch.as_tensor(value)
    tensors["random:cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random:cuda"] = torch.cuda.get_rng_state()
    return tensors


def parameter_tensors(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Parameters by the names that they have in a checkpoint."""
    return {f"parameter:{name}": p.detach() for name, p in parameters.items()}


def load_whole(path: Path, parameters: Mapping[str, nn.Parameter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `load_tensors`, with the shards that the checkpoint names: all processes read together.

    A shard of a parameter that is sharded here too is read as it lies here; others are read whole.
    """
    tensors, metadata = load_tensors(path)
    find_shards(path, metadata, damaged)
    if (shards := metadata.get("shards")) is not None:
        targets = {name: _like(path, name, parameters) for name in shards["names"]}
        read_shards(path, shards, targets, damaged)
        tensors |= targets
    return tensors, metadata


def _like(path: Path, name: str, parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """A place for a tensor of a checkpoint, shaped and spread as its parameter is."""
    parameter = parameters.get(name.split(":", 1 if name.startswith("parameter:") else 2)[-1])
    if parameter is None:
        raise damaged(path, f"it holds {name!r}, which is not trained")
    return torch.zeros_like(parameter.detach())


def restore_training(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a checkpoint of `training_tensors` back and return its metadata.

    Raises:
        LolcatsError: it cannot be read, is of another model, or something in it is missing or odd.
    """
    tensors, metadata = load_whole(path, parameters)
    states = _optimizer_states(path, tensors, parameters, metadata["step"])
    _restore_random(path, tensors)
    restore_parameters(path, tensors, parameters)
    for name, p in parameters.items():
        if name in states:  # the step counter stays where AdamW keeps it: on the CPU unless fused
            fused = bool(optimizer.defaults.get("fused"))
            optimizer.state[p] = {
                k: (v.to(p.device) if fused else v) if k == "step" else _spread(v, p) for k, v in states[name].items()
            }
    return metadata


def _spread(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A tensor of a parameter's shape, where and as the parameter lies."""
    if is_shard(value) or not is_shard(parameter):
        return value.to(parameter.device)
    spread = torch.zeros_like(parameter.detach())
    local_part(spread).copy_(own_rows(value, spread))
    return spread


def _optimizer_states(
    path: Path, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], step: int
) -> dict[str, dict[str, Tensor]]:
    """What AdamW keeps, by parameter; a parameter that never had a gradient has nothing."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer:"):
            _, slot, name = (*key.split(":", 2), "", "")[:3]
            states.setdefault(name, {})[slot] = value
    if step and not states:
        raise damaged(path, "the state of the optimizer is missing")
    for name, state in states.items():
        if name not in parameters:
            raise damaged(path, f"it has a state of the optimizer for {name!r}, which is not trained")
        if state.keys() != SLOTS:
            raise damaged(path, f"the state of the optimizer for {name} is not complete")
        for slot, value in state.items():
            shape = torch.Size([]) if slot == "step" else parameters[name].shape
            if value.shape != shape or value.dtype != torch.float32 or not finite(value):
                raise damaged(path, f"the state of the optimizer for {name} has an odd {slot}")
    return states


def _restore_random(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        torch.set_rng_state(tensors["random:cpu"])
        if "random:cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random:cuda"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise damaged(path, f"the state of the random numbers is missing or odd ({type(error).__name__})") from error


def restore_parameters(path: Path, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy the parameters of a checkpoint into the model's.

    Raises:
        LolcatsError: names or shapes differ: it is a checkpoint of another model or other settings; or its numbers are
            of another kind, or not finite.
    """
    held = {k.removeprefix("parameter:"): v for k, v in tensors.items() if k.startswith("parameter:")}
    if held.keys() != parameters.keys() or any(held[n].shape != p.shape for n, p in parameters.items()):
        raise LolcatsError(
            f"{path} belongs to another model or other settings: it holds {len(held)} trained tensors, "
            f"this run trains {len(parameters)}; use the run's own configuration or another name"
        )
    for name, p in parameters.items():
        if held[name].dtype != p.dtype:
            raise damaged(path, f"{name} is {held[name].dtype}, expected {p.dtype}")
        if not finite(held[name]):
            raise damaged(path, f"{name} holds numbers that are not finite")
    with torch.no_grad():
        for name, p in parameters.items():
            local_part(p).copy_(local_part(_spread(held[name], p)))


def finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; of a sharded tensor, those that this process has."""
    return bool(local_part(tensor.detach()).isfinite().all())


def is_number(value: object) -> bool:
    """Whether a value of metadata is a number and not NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
