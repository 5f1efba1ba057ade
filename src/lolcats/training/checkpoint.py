"""Checkpoints: one safetensors file with everything that an exact continuation needs, written atomically."""

from __future__ import annotations

import json
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

FORMAT = "lolcats-checkpoint-1"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to `path`; an interruption or a full disk leaves the old file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ready = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(ready, temporary, metadata={"format": FORMAT, "content": json.dumps(dict(metadata))})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        LolcatsError: the file is missing, truncated or not a lolcats checkpoint.
    """
    with _opened(path) as (file, metadata):
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118  # not a dict


def read_metadata(path: Path) -> dict[str, Any]:
    """Only the metadata of what `save_tensors` wrote; raises as `load_tensors` does."""
    with _opened(path) as (_, metadata):
        return metadata


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A checkpoint and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise LolcatsError(f"{path} is not a checkpoint of lolcats (format {metadata.get('format')!r})")
            yield file, json.loads(metadata["content"])
    except (OSError, SafetensorError) as error:
        raise LolcatsError(f"cannot read the checkpoint {path}: {error}; delete it to start this stage anew") from error


def training_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters, optimizer state and random number generators as named tensors."""
    tensors: dict[str, Tensor] = {f"parameter:{name}": p for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer:{key}:{name}"] = torch.as_tensor(value)
    tensors["random:cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random:cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_training(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a checkpoint of `training_tensors` back and return its metadata."""
    tensors, metadata = load_tensors(path)
    restore_parameters(path, tensors, parameters)
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer:"):
            _, slot, name = key.split(":", 2)
            states.setdefault(name, {})[slot] = value
    for name, p in parameters.items():
        if name in states:  # the step counter stays where AdamW keeps it: on the CPU unless fused
            fused = bool(optimizer.defaults.get("fused"))
            optimizer.state[p] = {
                k: v if k == "step" and not fused else v.to(p.device) for k, v in states[name].items()
            }
    torch.set_rng_state(tensors["random:cpu"])
    if "random:cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random:cuda"])
    return metadata


def restore_parameters(path: Path, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy the parameters of a checkpoint into the model's.

    Raises:
        LolcatsError: names or shapes differ: it is a checkpoint of another model or other settings.
    """
    held = {k.removeprefix("parameter:"): v for k, v in tensors.items() if k.startswith("parameter:")}
    if held.keys() != parameters.keys() or any(held[n].shape != p.shape for n, p in parameters.items()):
        raise LolcatsError(
            f"{path} belongs to another model or other settings: it holds {len(held)} trained tensors, "
            f"this run trains {len(parameters)}; use the run's own configuration or another name"
        )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(held[name])
