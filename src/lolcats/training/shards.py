"""Checkpoints of sharded tensors: each process writes its own rows, and any number of processes reads them again.

torch.distributed.checkpoint plans who reads what; the files are safetensors, so that nothing is pickled. A folder of
shards is written under a name of its own before the checkpoint's file names it, and deleted when none does any more, so
a kill at any moment leaves the last checkpoint whole.
"""

from __future__ import annotations

import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from lolcats.errors import LolcatsError, first_line
from lolcats.models.sharded import is_shard
from lolcats.training.parallel import from_main_process

ENDING = ".shards"


def write_apart(
    file: Path, step: int, accelerator: Accelerator, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Write those of the tensors of a checkpoint that are sharded; the others, and what `write_shards` says of those.

    Raises:
        LolcatsError: see `write_shards`.
    """
    spread = {name: tensor for name, tensor in tensors.items() if is_shard(tensor)}
    shards = write_shards(file, step, spread, accelerator) if spread else {}
    return {name: tensor for name, tensor in tensors.items() if name not in spread}, shards


def write_shards(file: Path, step: int, tensors: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, Any]:
    """Write sharded tensors beside the checkpoint `file`, in all processes.

    Returns:
        What the metadata of the checkpoint must say: the name of the folder, and the sizes of its files.

    Raises:
        LolcatsError: the disk is full or the place cannot be written; the checkpoint that there is stays.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    def begin() -> str:
        folder = file.parent / f"{file.stem}-{step:08}-{secrets.token_hex(4)}{ENDING}"
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise LolcatsError(f"cannot write {folder}: {error.strerror or error}") from error
        return folder.name

    folder = file.parent / from_main_process(accelerator, begin)

    def failed(what: str) -> LolcatsError:
        shutil.rmtree(folder, ignore_errors=True)
        return LolcatsError(f"cannot write the checkpoint {folder}: {what}")

    with _explained(failed):
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())

    def describe() -> dict[str, Any]:
        return {"shards": {"folder": folder.name, "names": sorted(tensors), "files": _sizes(folder)}}

    return from_main_process(accelerator, describe)


def read_shards(
    file: Path, shards: Mapping[str, Any], tensors: Mapping[str, Tensor], damaged: Callable[[Path, object], Exception]
) -> None:
    """Read what `write_shards` wrote into tensors of the same names, sharded or whole; all processes read together.

    Args:
        file: the checkpoint.
        shards: of its metadata.
        tensors: written in place.
        damaged: makes the error for a checkpoint that cannot be used.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    folder = file.parent / shards["folder"]
    with _explained(partial(damaged, folder)):
        reader = HuggingFaceStorageReader(str(folder))
        load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())


def find_shards(file: Path, metadata: Mapping[str, Any], damaged: Callable[[Path, object], Exception]) -> None:
    """See that the shards that a checkpoint names are there, by their names and sizes; raises what `damaged` makes."""
    shards = metadata.get("shards")
    if shards is None:
        return
    try:
        folder, expected = file.parent / str(shards["folder"]), dict(shards["files"])
        known = folder.name == shards["folder"] and isinstance(shards["names"], list)
    except (KeyError, TypeError, ValueError):
        known, folder, expected = False, file, {}
    if not known:
        raise damaged(file, "its metadata does not say where its shards are")
    found = _sizes(folder)
    if lost := sorted(name for name in expected if name not in found):
        raise damaged(folder, f"expected {len(expected)} files of shards, {lost[0]} is missing")
    if short := [name for name, size in expected.items() if found[name] != size]:
        raise damaged(folder, f"{short[0]} has {found[short[0]]:,} bytes of {expected[short[0]]:,}")


def remove_other_shards(folder: Path, named: Sequence[Mapping[str, Any]]) -> None:
    """Delete the shards in the folder of a stage that none of its checkpoints names."""
    kept = {shards["folder"] for metadata in named if isinstance(shards := metadata.get("shards"), dict)}
    for item in folder.glob(f"*{ENDING}"):
        if item.name not in kept:
            shutil.rmtree(item, ignore_errors=True)


def _sizes(folder: Path) -> dict[str, int]:
    return {item.name: item.stat().st_size for item in sorted(folder.glob("*")) if item.is_file()}


@contextmanager
def _explained(error_of: Callable[[str], Exception]) -> Iterator[None]:
    """Inside, torch may save or load: what it raises, for all processes together, becomes an error with a reason."""
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is one process
        try:
            yield
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            inner = [cause for cause, _ in getattr(error, "failures", {}).values()]
            raise error_of(first_line(inner[0] if inner else error)) from error
