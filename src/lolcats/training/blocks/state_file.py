"""One file of hidden states: safetensors, with what it belongs to and checksums of its bytes in the metadata.

The metadata has one entry, since safetensors writes several in any order: FORMAT, with a CRC-32 of the text after it,
which is JSON: `key`, `identity`, and `tensors` as {name: [type, shape, CRC-32 of its bytes]}. What the header says of
the tensors must be what this says, so every byte of the file is under a checksum.

CRC-32 finds every flip of one or two bits and every damaged stretch of up to 32 bits, and comes with Python. It passes
2 GB/s a core (docs/scale.md), where training on tokens of 16 KB reads a tenth of that.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from lolcats.errors import LolcatsError
from lolcats.files import atomic_file
from lolcats.models.shards import DTYPES, NAMES
from lolcats.printable import reason, shorten

FORMAT = "lolcats-hidden-states-1"
PIECE = 1 << 20
"""Bytes that are read and then summed while they are in the processor's cache."""
OTHER = {"model": "of another model", "data": "of other data", "settings": "made with other settings"}
"""Part of an identity -> what a file is where it differs."""


class Damaged(Exception):
    """A file whose bytes are not those that were written; says how that shows."""


def write_states(path: Path, key: str, identity: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of this machine's memory to a file that is whole or not there; equal ones give equal bytes.

    Raises:
        LolcatsError: the disk is full, or the place cannot be written.
    """
    held = {name: [NAMES[t.dtype], list(t.shape), _crc(t)] for name, t in tensors.items()}
    content = json.dumps({"key": key, "identity": identity, "tensors": held}, sort_keys=True)
    with atomic_file(path, apart=True) as temporary:
        save_file(dict(tensors), temporary, metadata={FORMAT: f"{zlib.crc32(content.encode())} {content}"})


def read_states(path: Path, key: str, identity: Mapping[str, Any], remedy: str) -> dict[str, Tensor]:
    """Read what `write_states` wrote, byte by byte checked.

    Raises:
        LolcatsError: it is damaged, or of another identity; `remedy` says what to do.
        FileNotFoundError: it is not there.
    """
    try:
        with path.open("rb", buffering=0) as file:
            held, places = _read_header(file, path, key, identity, remedy)
            return {name: _read_tensor(file, name, *held[name], places[name]) for name in sorted(held)}
    except Damaged as error:
        raise LolcatsError(f"{path} is damaged: {error}; {remedy}") from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LolcatsError(f"cannot read {path}: {error.strerror or error}") from error


def has_states(path: Path, key: str, identity: Mapping[str, Any], remedy: str) -> bool:
    """Whether a file is there with its whole length and a sound header; its tensors are not read.

    Raises:
        LolcatsError: it is of another identity; `remedy` says what to do.
    """
    try:
        with path.open("rb", buffering=0) as file:
            _read_header(file, path, key, identity, remedy)
    except (Damaged, FileNotFoundError):
        return False
    except OSError as error:
        raise LolcatsError(f"cannot read {path}: {error.strerror or error}") from error
    return True


def _read_header(
    file: BinaryIO, path: Path, key: str, identity: Mapping[str, Any], remedy: str
) -> tuple[dict[str, tuple[str, list[int], int]], dict[str, int]]:
    """What the file holds (type, shape and checksum by name), and where each tensor begins."""
    total = os.fstat(file.fileno()).st_size
    length = int.from_bytes(_read(file, 8), "little")
    if length > total - 8:
        raise Damaged(f"its {total:,} bytes end within the header")
    try:
        content, begins = _parse_header(_read(file, length))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"its header cannot be read ({reason(error, 80)})") from error
    held = {name: (kind, shape, crc) for name, (kind, shape, crc) in content["tensors"].items()}
    expected = 8 + length + sum(_bytes_of(kind, shape) for kind, shape, _ in held.values())
    if total != expected:
        raise Damaged(f"it has {total:,} bytes, expected {expected:,}")
    found = _differences(content["identity"], json.loads(json.dumps(identity)))
    if content["key"] != key:
        found.append(f"of {content['key']} (expected {key})")
    if found:
        raise LolcatsError(f"{path} holds hidden states {' and '.join(found)}; {remedy}")
    return held, {name: 8 + length + begin for name, begin in begins.items()}


def _parse_header(raw: bytes) -> tuple[dict[str, Any], dict[str, int]]:
    """What the metadata say, and where each tensor begins after the header."""
    header = json.loads(raw)
    crc, _, text = header.pop("__metadata__")[FORMAT].partition(" ")
    if zlib.crc32(text.encode()) != int(crc):
        raise ValueError("its checksum is wrong")
    content = json.loads(text)
    places = {name: entry["data_offsets"] for name, entry in header.items()}
    said = {name: [entry["dtype"], entry["shape"], places[name][1] - places[name][0]] for name, entry in header.items()}
    if said != {name: [kind, shape, _bytes_of(kind, shape)] for name, (kind, shape, _) in content["tensors"].items()}:
        raise ValueError("it contradicts itself")
    return content, {name: begin for name, (begin, _) in places.items()}


def _read_tensor(file: BinaryIO, name: str, kind: str, shape: list[int], crc: int, place: int) -> Tensor:
    tensor = torch.empty(shape, dtype=DTYPES[kind], pin_memory=torch.cuda.is_available())  # moves on by itself
    view, found = memoryview(_bytes(tensor)), 0  # type: ignore[arg-type]  # numpy arrays are buffers
    file.seek(place)
    while len(view):
        count = file.readinto(view[:PIECE])  # type: ignore[attr-defined]
        if not count:
            raise Damaged(f"it ends within {name}")
        found, view = zlib.crc32(view[:count], found), view[count:]
    if found != crc:
        raise Damaged(f"the checksum of {name} is wrong")
    return tensor


def _read(file: BinaryIO, count: int) -> bytes:
    """`count` bytes, or fewer at the end of the file."""
    parts = []
    while count and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor as an array of bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(_bytes(tensor))


def _bytes_of(kind: str, shape: list[int]) -> int:
    return math.prod(shape) * DTYPES[kind].itemsize


def _differences(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, in words."""
    found = []
    for part in sorted(saved.keys() | expected.keys()):
        old, new = saved.get(part), expected.get(part)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
            said = ", ".join(f"{name} {_show(old.get(name))}, expected {_show(new.get(name))}" for name in names)
        else:
            said = f"{_show(old)}, expected {_show(new)}"
        found.append(f"{OTHER.get(part, f'of another {part}')} ({said})")
    return found


def _show(value: object) -> str:
    return shorten(json.dumps(value), 60)
