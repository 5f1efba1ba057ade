"""Rows of files on this machine."""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from lolcats.data.records import Row
from lolcats.errors import DataError

TEXT_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
TOKEN_SUFFIXES = (".u16", ".u32", ".bin")
_ARRAYS = (".json", ".json.gz")  # read where they are named, or alone in a folder: they may hold anything


def find_files(source: str, suffixes: tuple[str, ...], hint: str = "") -> list[Path]:
    """List the files that a path, folder (with its sub-folders) or glob names, sorted, kept by file name ending.

    Raises:
        DataError: no such file, or none with one of `suffixes`; `hint` says what else a source may be.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file()]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    files = sorted(file for file in found if file.name.endswith(suffixes))
    if not files:
        what = f"has no {', '.join(suffixes)} file" if found or path.exists() else "matches no file or folder"
        raise DataError(f"source {source!r} {what}; give a path, a folder or a glob{hint}")
    return files


def find_data(source: str, hint: str = "") -> list[Path]:
    """As `find_files`, for text: .txt, .jsonl and .parquet, or .json where there is nothing else.

    Raises:
        DataError: see `find_files`.
    """
    try:
        return find_files(source, TEXT_SUFFIXES, hint)
    except DataError:
        path = Path(source).expanduser()
        arrays = sorted(path.rglob("*")) if path.is_dir() else [path]
        arrays = [file for file in arrays if file.is_file() and file.name.endswith(_ARRAYS)]
        if not arrays:
            raise
        return arrays


def is_saved_dataset(source: str) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk` of the library datasets."""
    return any((Path(source).expanduser() / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read_files(files: Sequence[Path], in_proportion: bool = False) -> Iterator[Row]:
    """Rows of files, one file after the other or, `in_proportion`, as in `mix_streams`.

    Raises:
        DataError: a file that cannot be read, named with the line.
    """
    if not in_proportion:
        return chain.from_iterable(map(_read_file, files))
    return mix_streams([(str(file), file.stat().st_size, lambda file=file: file.open("rb")) for file in files])


def mix_streams(files: Sequence[tuple[str, int, Callable[[], BinaryIO]]]) -> Iterator[Row]:
    """Read files side by side, always from the one of which the smallest share was read.

    So the first part of what comes out is a mixture like the whole, however the data set is cut into files.

    Args:
        files: name, size in bytes, and a function that opens it, of each .txt or .jsonl file.
    """
    with ExitStack() as stack:
        streams = []
        for name, size, open_file in files:
            with _reading(name):
                raw = stack.enter_context(open_file())
            streams.append((raw, max(1, size), _read_stream(name, raw)))
        while streams:
            shares = [raw.tell() / size for raw, size, _ in streams]
            index = shares.index(min(shares))
            row = next(streams[index][2], None)
            if row is None:
                del streams[index]
            else:
                yield row


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    with _reading(str(path)), path.open("rb") as raw:
        yield from _read_stream(str(path), raw)


def _read_stream(name: str, raw: BinaryIO) -> Iterator[Row]:
    with _reading(name):
        opened = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw
        kind = name.removesuffix(".gz")
        with io.TextIOWrapper(opened, encoding="utf-8-sig") as lines:  # type: ignore[arg-type]
            if kind.endswith(".txt"):
                yield {"text": lines.read()}, name
            elif kind.endswith(".json"):
                yield from _read_array(lines.read(), name)
            else:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _parse_line(line, f"{name}:{number}"), f"{name}:{number}"


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text ({error.reason}); convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {name}: {error}") from error


def _parse_line(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON ({error}); expected one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {line.strip()!r:.60}")
    return row


def _read_array(text: str, name: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}: broken JSON ({error}); lines of objects belong into a .jsonl file") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{name}: expected a JSON list of objects, got {text.strip()!r:.60}")
    for number, row in enumerate(rows):
        yield row, f"{name} item {number}"


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise DataError(f'{path} needs the library pyarrow: pip install "lolcats[data]"') from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield row, f"{path} row {number}"
                number += 1
    except (OSError, ArrowInvalid) as error:
        raise DataError(f"cannot read {path}: {error}") from error
