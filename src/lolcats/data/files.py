"""Rows of files on this machine."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from lolcats.data.records import Row
from lolcats.errors import DataError
from lolcats.files import read_json_lines, text_of

TEXT_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
TOKEN_SUFFIXES = (".u16", ".u32", ".bin")
_ARRAYS = (".json", ".json.gz")  # read where they are named, or alone in a folder: they may hold anything
_ADVICE = {
    (".csv", ".tsv"): "tables of text are read as hf:FOLDER, or written as .jsonl, an object a line",
    (".npy", ".npz", ".pt"): "token ids are read from .u16 and .u32 files, as numpy's tofile writes them",
    (
        ".zip",
        ".tar",
        ".bz2",
        ".xz",
        ".zst",
        ".7z",
        ".gz",
    ): "of compressed files .txt.gz, .jsonl.gz and .json.gz are read",
    (".md", ".html", ".pdf", ".docx", ".epub", ".xml"): "convert it to plain text in a .txt file",
}
"""What to do with files that people have."""


def has_ending(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a name ends so, in small letters or capitals."""
    return name.lower().endswith(suffixes)


def find_files(source: str, suffixes: tuple[str, ...], hint: str = "") -> list[Path]:
    """List the files that a path, folder (with its sub-folders) or glob names, sorted, kept by file name ending.

    Links to folders are followed; a folder that is reached in several ways is read once.

    Raises:
        DataError: no such file, none with one of `suffixes`, or a link to one that is not there; `hint` says what else
            a source may be.
    """
    path = Path(source).expanduser()
    if os.path.isdir(path):  # pathlib's own questions fail on names that are too long
        found = _walk(path)
    elif os.path.isfile(path) or os.path.islink(path):
        found = [path]
    else:
        found = _glob(path)
    files = sorted(file for file in found if has_ending(file.name, suffixes))
    if not files:
        what = f"has no {', '.join(suffixes)} file" if found or os.path.exists(path) else "matches no file or folder"
        advice = next((text for ends, text in _ADVICE.items() if any(has_ending(f.name, ends) for f in found)), "")
        other = f"; {advice}" if advice else f"; give a path, a folder or a glob{hint}"
        raise DataError(f"source {source!r} {what}{other}")
    if gone := [file for file in files if not file.exists()]:
        raise DataError(f"{gone[0]} is a link to a file that is not there; mend or remove it")
    return [file for file in files if file.is_file()]


def _walk(folder: Path) -> list[Path]:
    """All files in a folder and its sub-folders, through links too."""

    def refuse(error: OSError) -> None:
        if not os.path.isdir(folder):
            return  # the beginning of a glob that matches nothing
        raise DataError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    seen: set[str] = set()
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(parent))
        folders[:] = [name for name in sorted(folders) if os.path.realpath(os.path.join(parent, name)) not in seen]
        files += [Path(parent, name) for name in names]
    return _once(files)


def _glob(pattern: Path) -> list[Path]:
    """The files that a glob names. The library's own `**` goes round in circles where links do."""
    parts = pattern.parts
    if "**" not in parts:
        return _once(Path(name) for name in glob.glob(str(pattern)) if not os.path.isdir(name))
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:fixed])
    return [file for file in _walk(base) if _matches(file.relative_to(base).parts, parts[fixed:])]


def _matches(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path matches, part by part; hidden names only where they are asked for."""
    if not names or not pattern:
        return not names and all(part == "**" for part in pattern)
    hidden = names[0].startswith(".")
    if pattern[0] == "**":
        return _matches(names, pattern[1:]) or (not hidden and _matches(names[1:], pattern))
    fits = fnmatch.fnmatchcase(names[0], pattern[0]) and (not hidden or pattern[0].startswith("."))
    return fits and _matches(names[1:], pattern[1:])


def _once(paths: Iterable[Path]) -> list[Path]:
    """Each name of a folder once, however many links lead to the folder."""
    return list({(os.path.realpath(path.parent), path.name): path for path in sorted(paths, reverse=True)}.values())


def find_data(source: str, hint: str = "") -> list[Path]:
    """As `find_files`, for text: .txt, .jsonl and .parquet, or .json where there is nothing else.

    Raises:
        DataError: see `find_files`.
    """
    try:
        return find_files(source, TEXT_SUFFIXES, hint)
    except DataError as error:
        try:
            return find_files(source, _ARRAYS, hint)
        except DataError:
            raise error from None


def is_saved_dataset(source: str) -> bool:
    """Whether a folder was written by `Dataset.save_to_disk` of the library datasets."""
    return any(os.path.isfile(Path(source).expanduser() / name) for name in ("state.json", "dataset_dict.json"))


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
            raw = stack.enter_context(_opened(name, open_file))
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
    if has_ending(path.name, (".parquet",)):
        yield from _read_parquet(path)
        return
    with _opened(str(path), lambda: path.open("rb")) as raw:
        yield from _read_stream(str(path), raw)


def _opened(name: str, open_file: Callable[[], BinaryIO]) -> BinaryIO:
    try:
        return open_file()
    except OSError as error:
        raise DataError(f"cannot read {name}: {error}") from error


def _read_stream(name: str, raw: BinaryIO) -> Iterator[Row]:
    kind = name.lower().removesuffix(".gz")
    if kind.endswith((".txt", ".json")):
        with text_of(name, raw) as text:
            content = text.read()
        if kind.endswith(".txt"):
            yield {"text": _checked(content, name)}, name
        else:
            yield from _read_array(content, name)
    else:
        yield from read_json_lines(name, raw)


def _checked(text: str, name: str) -> str:
    if "\0" in text:
        raise DataError(f"{name} holds NUL bytes, so it is no UTF-8 text (UTF-16, perhaps); convert it to UTF-8")
    return text


def _read_array(text: str, name: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: broken JSON ({error}); lines of objects belong into a .jsonl file") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{name}: expected a JSON list of objects, got {text.strip()!r:.60}")
    for number, row in enumerate(rows):
        yield row, f"{name} item {number}"


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f'{path} needs the library pyarrow: pip install "lolcats[data]"') from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield row, f"{path} row {number}"
                number += 1
    except (OSError, ValueError, ArrowException) as error:
        raise DataError(f"cannot read {path} at row {number}: {error}") from error
