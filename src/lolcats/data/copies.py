"""Copies of data sets of the hub on this machine: a file, a downloaded repository, or a folder of `save_to_disk`.

A copy is read as the hub would be: the library datasets decides which files a configuration and a split are, by the
card of the repository or by names of files. Nothing else is ever read in their place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lolcats.data.files import find_data, has_ending, is_saved_dataset, read_files
from lolcats.data.records import Row
from lolcats.errors import DataError

if TYPE_CHECKING:
    from types import ModuleType

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the name of a file that say its split, as the library datasets reads them."""
_SHARD = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})")


def read_copy(
    copy: str,
    config: str | None,
    split: str,
    *,
    source: str,
    revision: str | None = None,
    pattern: str | None = None,
) -> Iterator[Row]:
    """Rows of one configuration and one split; which files these are is found out before the first row is asked for.

    A single file, and what `save_to_disk` wrote, is what the user says it is, unless it says something else itself.

    Args:
        copy: file, glob or folder.
        config: None where the data set has a default one.
        source: what the user called the data set, for messages.
        revision: of the hub; the copy must be known to be of it.
        pattern: raw files of a repository that are read side by side, whatever the split.

    Raises:
        DataError: nothing is there, it cannot be read, or it has no such configuration, split or revision.
    """
    path = Path(copy).expanduser()
    if revision is not None:
        _check_revision(path, revision, source)
    if is_saved_dataset(copy):
        return _read_saved_split(path, config, split, source)
    if not path.is_dir():
        files = find_data(copy)
        _check_names(files, split, source)
        return read_files(
            files, pattern is not None and not any(has_ending(file.name, (".parquet",)) for file in files)
        )
    if pattern is None:
        return _read_repository(path.resolve(), config, split, source)
    files = sorted(file for end in ("", ".gz") for file in path.glob(pattern + end) if file.is_file())
    if not files:
        raise DataError(f"{copy}, the copy of {source!r}, has no files {pattern}; expected those of the hub")
    return read_files(files, in_proportion=True)


def library(source: str) -> ModuleType:
    """The library datasets.

    Raises:
        DataError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f'source {source!r} needs the datasets library: pip install "lolcats[data]"') from error
    return datasets


def in_words(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return " ".join(str(error).split())[:600] or type(error).__name__


@contextmanager
def hushed(datasets: ModuleType) -> Iterator[None]:
    """Without the warnings and bars of the libraries: what matters is an error."""
    from huggingface_hub.utils import logging as hub_logging

    bars, levels = (
        datasets.are_progress_bars_disabled(),
        (datasets.logging.get_verbosity(), hub_logging.get_verbosity()),
    )
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if not bars:
            datasets.enable_progress_bars()


def _check_revision(path: Path, revision: str, source: str) -> None:
    """Copies of `hf download` say of which commit they are: in their path, or in a folder of notes."""
    notes = (path if path.is_dir() else path.parent) / ".cache" / "huggingface" / "download"
    known = {path.resolve().name, path.name}
    for note in notes.rglob("*.metadata"):
        known.add(next(iter(note.read_text(encoding="utf-8", errors="replace").splitlines()), ""))
    if revision not in known:
        raise DataError(
            f"{path}, the copy of {source!r}, does not say that it is of revision {revision}; leave revision out, give "
            "the full commit that `hf download` fetched, or read from the hub"
        )


def _check_names(files: Sequence[Path], split: str, source: str) -> None:
    for file in files:
        stem = file.name.lower()
        said = {
            name for name, words in _SPLITS.items() if re.search(rf"(^|[-._ 0-9])({'|'.join(words)})[-._ 0-9]", stem)
        }
        if said and split not in said and split.lower() not in stem:
            raise DataError(
                f"{file} is called after the split {' and '.join(sorted(said))}, and {source!r} asks for {split!r}; "
                "name the file of that split, or rename it"
            )


def read_saved(folder: str) -> Iterator[Row]:
    """Rows of a data set that `save_to_disk` wrote.

    Raises:
        DataError: it cannot be read, or has several splits.
    """
    datasets = library(folder)
    saved = _load_saved(Path(folder).expanduser(), datasets)
    if isinstance(saved, datasets.DatasetDict):
        splits = ", ".join(saved)
        raise DataError(
            f"{folder} has the splits {splits}; name one of them: hf:{folder}::{next(iter(saved), 'SPLIT')}"
        )
    return _numbered(saved, folder)


def _load_saved(folder: Path, datasets: ModuleType) -> Any:
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets and its readers have no common class of errors
        raise DataError(f"cannot read {folder}, a folder of save_to_disk: {in_words(error)}") from error


def _read_saved_split(folder: Path, config: str | None, split: str, source: str) -> Iterator[Row]:
    datasets = library(source)
    saved = _load_saved(folder, datasets)
    rows = saved
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{folder} has no split {split!r}, which {source!r} asks for; it has {', '.join(saved)}")
        rows = saved[split]
    elif saved.split is not None and str(saved.split) != split:
        raise DataError(f"{folder} holds the split {str(saved.split)!r}, and {source!r} asks for {split!r}")
    if config is not None and rows.config_name not in (None, config):
        raise DataError(f"{folder} holds the configuration {rows.config_name!r}, and {source!r} asks for {config!r}")
    return _numbered(rows, str(folder))


def _read_repository(folder: Path, config: str | None, split: str, source: str) -> Iterator[Row]:
    datasets = library(source)
    with hushed(datasets):
        try:
            builder = _builder(datasets, folder, config)
            files = builder.config.data_files or {}
        except DataError as error:
            raise DataError(f"{error}, which {source!r} asks for") from error
        except Exception as error:  # as in _load_saved
            raise DataError(f"cannot load {source!r} from {folder}: {in_words(error)}") from error
        splits = {str(name): [str(file) for file in names] for name, names in files.items()}
        if split not in splits:
            found = ", ".join(splits) or "none"
            of = f" in its configuration {builder.config.name!r}" if config is not None else ""
            raise DataError(f"{folder} has no split {split!r}{of}, which {source!r} asks for; it has {found}")
        _check_files(splits[split], folder)
        try:
            rows = builder.as_streaming_dataset(split=split)
        except Exception as error:  # as in _load_saved
            raise DataError(f"cannot load {source!r} from {folder}: {in_words(error)}") from error
    return _numbered(rows, str(folder))


def _builder(datasets: ModuleType, folder: Path, config: str | None) -> Any:
    """What knows the files of a configuration.

    Raises:
        DataError: there is none of this name.
    """
    known = datasets.get_dataset_config_names(str(folder))
    if config is None or config in known:
        if config is None and len(known) > 1 and datasets.get_dataset_default_config_name(str(folder)) is None:
            raise DataError(f"{folder} has the configurations {', '.join(known)}, not the default one")
        return datasets.load_dataset_builder(str(folder), config)
    if known == ["default"]:  # without a card, folders are named after configurations
        if folder.name == config:
            return datasets.load_dataset_builder(str(folder))
        if config not in (".", "..") and Path(config).name == config and (folder / config).is_dir():
            return datasets.load_dataset_builder(str(folder / config))
    raise DataError(f"{folder} has no configuration {config!r} (found: {', '.join(known)})")


def _check_files(files: Sequence[str], folder: Path) -> None:
    """Refuse files elsewhere, and a download that broke off: NAME-00000-of-00002 without NAME-00001-of-00002."""
    if strays := [file for file in files if not Path(os.path.normpath(file)).is_relative_to(folder)]:
        raise DataError(f"the card of {folder} names {strays[0]}, which is not in it; name that file itself")
    numbers: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if found := _SHARD.match(file):
            numbers.setdefault((found["name"], int(found["count"])), set()).add(int(found["number"]))
    for (name, count), there in numbers.items():
        if missing := [number for number in range(count) if number not in there]:
            raise DataError(
                f"{name}-{missing[0]:05}-of-{count:05}.* is missing ({len(there)} of {count} files are there)"
            )


def _numbered(rows: Any, name: str) -> Iterator[Row]:
    number = 0
    try:
        with hushed(library(name)):
            for row in rows:
                yield dict(row), f"{name} row {number}"
                number += 1
    except DataError:
        raise
    except Exception as error:  # as in _load_saved
        raise DataError(f"cannot read {name} at row {number}: {in_words(error)}") from error
