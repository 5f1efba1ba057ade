"""Weights on disk, read and written a piece at a time: no more of them is in memory than a few rows of one tensor.

safetensors writes a file from tensors that are all in memory. Its format is a header that says where each tensor lies,
and their bytes one after the other, so a file can as well be written while its tensors are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lolcats.errors import LolcatsError
from lolcats.files import check_room
from lolcats.models.weights import all_finite

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Of a file of weights that is written anew; transformers' own limit of 50 GB would be held in memory."""
PIECE = 1 << 24
"""Bytes of a tensor that are in memory together."""
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""Number formats as the header of a file calls them."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor that can be had piece by piece."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]
    """Its rows in order, some at a time; a tensor without rows in one piece."""

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> Entry:
        """The same in another number format."""
        return Entry(self.shape, dtype, lambda: (piece.to(dtype) for piece in self.pieces()))

    def plus(self, change: Callable[[], Tensor]) -> Entry:
        """With a tensor of its shape added in place, which is asked for when the pieces are."""

        def changed() -> Iterator[Tensor]:
            whole, row = change(), 0
            for piece in self.pieces():
                piece = piece.clone()
                piece += whole[row : row + len(piece)]
                row += len(piece)
                yield piece

        return Entry(self.shape, self.dtype, changed)


def held(tensor: Tensor) -> Entry:
    """A tensor in memory, on whatever device."""
    return Entry(tuple(tensor.shape), tensor.dtype, lambda: iter([tensor.detach().cpu()]))


def read_entries(file: Path) -> dict[str, Entry]:
    """The tensors of a file by name, unread.

    Raises:
        LolcatsError: it is no safetensors file, is damaged, or holds numbers that torch does not know.
    """
    found: dict[str, Entry] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict
                part = opened.get_slice(name)
                shape, kind = tuple(part.get_shape()), str(part.get_dtype())
                if kind not in DTYPES:
                    raise LolcatsError(f"{file}: {name} is of type {kind}; expected one of {', '.join(DTYPES)}")
                found[name] = Entry(shape, DTYPES[kind], _reader(file, name, shape, DTYPES[kind].itemsize))
    except (OSError, SafetensorError) as error:
        raise LolcatsError(f"cannot read {file}: {error}") from error
    return found


def _reader(file: Path, name: str, shape: tuple[int, ...], itemsize: int) -> Callable[[], Iterator[Tensor]]:
    rows = max(1, PIECE // max(1, torch.Size(shape[1:]).numel() * itemsize))

    def read() -> Iterator[Tensor]:
        for begin in range(0, max(1, shape[0]), rows) if shape else (0,):
            try:  # opened anew: what has been read stays in memory until the file is closed
                with safe_open(file, framework="pt") as opened:
                    piece = opened.get_slice(name)[begin : begin + rows] if shape else opened.get_tensor(name)
                    yield piece
            except (OSError, SafetensorError) as error:
                raise LolcatsError(f"cannot read {name} of {file}: {error}") from error

    return read


def weight_files(model: Path) -> list[Path]:
    """The files that hold the weights: one, or those that the index names.

    Raises:
        LolcatsError: there are none, one is missing, or the index is broken.
    """
    if (model / WEIGHTS).is_file():
        return [model / WEIGHTS]
    index = model / INDEX
    if not index.is_file():
        raise LolcatsError(f"{model} has no weights: expected {WEIGHTS}, or {INDEX} and the files that it names")
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise LolcatsError(f"{index} is not an index of weights ({type(error).__name__}: {error})") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise LolcatsError(f"{index} names {name!r}; expected the name of a safetensors file beside it")
        if not (model / name).is_file():
            raise LolcatsError(f"{model / name} is missing, which {INDEX} names")
    if not names:
        raise LolcatsError(f"{index} names no file of weights")
    return [model / name for name in names]


def check_finite(name: str, entry: Entry, file: Path) -> None:
    """Raise LolcatsError where a tensor has values that are not finite numbers."""
    if entry.dtype.is_floating_point and not all(map(all_finite, entry.pieces())):
        raise LolcatsError(f"{file}: {name} has values that are not finite (NaN or infinite); train it anew")


def split_into_shards(entries: dict[str, Entry], limit: int) -> list[list[str]]:
    """The names in order, cut where a file would have more than `limit` bytes; a larger tensor has its own file."""
    shards: list[list[str]] = []
    size = 0
    for name, entry in entries.items():
        if not shards or (size + entry.size > limit and shards[-1]):
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.size
    return shards


def write_shards(folder: Path, entries: dict[str, Entry], limit: int = SHARD_BYTES) -> list[Path]:
    """Write tensors as `save_pretrained` does: one file, or several and their index.

    Args:
        folder: of the model; nothing of the kind may be in it.
        entries: by name, in the order in which they are written; those read from the same file together.
        limit: bytes of a file.

    Raises:
        LolcatsError: the disk has not the room, a tensor cannot be read, or has values that are not finite.
        OSError: the place cannot be written.
    """
    total = sum(entry.size for entry in entries.values())
    check_room(folder, total)
    shards = split_into_shards(entries, limit)
    files = [WEIGHTS] if len(shards) == 1 else [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, {name: entries[name] for name in names})
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [folder / file for file in files]


def _write_file(path: Path, entries: dict[str, Entry]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    names, end = _aligned(entries), 0
    for name in names:
        entry = entries[name]
        header[name] = {
            "dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [end, end + entry.size]
        }  # fmt: skip
        end += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            _write_tensor(file, name, entries[name])


def _aligned(entries: dict[str, Entry]) -> Sequence[str]:
    """Widest numbers first, so that each tensor begins at a multiple of its own width."""
    return sorted(entries, key=lambda name: -entries[name].dtype.itemsize)


def _write_tensor(file: BinaryIO, name: str, entry: Entry) -> None:
    written = 0
    for piece in entry.pieces():
        piece = piece.to(entry.dtype).contiguous()
        if piece.is_floating_point() and not all_finite(piece):
            kind = str(entry.dtype).removeprefix("torch.")
            raise LolcatsError(
                f"{name} has values that are not finite (NaN or infinite) in {kind}; choose a wider format, or train "
                "it anew"
            )
        written += file.write(piece.reshape(-1).view(torch.uint8).numpy().data)
    assert written == entry.size, f"{name} has {written} bytes instead of {entry.size}"


def entries_of(files: Iterable[Path]) -> dict[str, Entry]:
    """The tensors of several files by name, unread; raises as `read_entries` does."""
    found: dict[str, Entry] = {}
    for file in files:
        found |= read_entries(file)
    return found
