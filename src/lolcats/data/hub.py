"""Rows of data sets of the Hugging Face hub, and a plain word where they cannot be had."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lolcats.data.files import find_data, is_saved_dataset, mix_streams, read_files
from lolcats.data.records import Row
from lolcats.errors import DataError

if TYPE_CHECKING:
    from types import ModuleType

_TIMEOUT = 10  # seconds until the hub counts as out of reach


def read_hub(
    name: str, config: str | None, split: str, *, source: str, revision: str | None = None, streaming: bool = True
) -> Iterator[Row]:
    """Rows of a data set of the hub, or of a folder that the library datasets can load.

    Where the hub is out of reach, the copy is read that datasets keeps of what it loaded before, or the one that
    `hf download` made.

    Args:
        name: OWNER/NAME, or a folder.
        source: what the user called it, for messages.
        streaming: fetch rows while they are read: reading fewer fetches less.

    Raises:
        DataError: it cannot be reached and there is no copy; or it cannot be loaded.
    """
    datasets = _library(source)
    trouble = None if Path(name).exists() else _why_unreachable(name, revision)
    try:
        with _offline(datasets, trouble is not None):
            rows = datasets.load_dataset(
                name, config, split=split, revision=revision, streaming=streaming and trouble is None
            )
    except Exception as error:  # datasets, its readers and the network have no common class of errors
        if trouble is None:
            raise DataError(f"cannot load {source!r}: {error}") from error
        yield from read_copy(_downloaded(name, revision, source, trouble), split, source=source)
        return
    number = 0
    try:
        for row in rows:
            yield dict(row), f"{source} row {number}"
            number += 1
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"reading {source!r} broke off at row {number} ({error}); run again to go on") from error


def read_hub_files(name: str, pattern: str, *, source: str, revision: str | None = None) -> Iterator[Row]:
    """Rows of the .jsonl files of a data set, side by side, see `mix_streams`; nothing is stored.

    Raises:
        DataError: the hub is out of reach, or has no such files.
    """
    _library(source)
    if (trouble := _why_unreachable(name, revision)) is not None:
        yield from read_copy(_downloaded(name, revision, source, trouble), "train", source=source, in_proportion=True)
        return
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem()
    place = f"datasets/{name}" + (f"@{revision}" if revision else "")
    try:
        found: dict[str, Any] = dict(hub.glob(f"{place}/{pattern}", detail=True))  # type: ignore[arg-type]
    except Exception as error:
        raise DataError(f"cannot list the files of {source!r}: {error}") from error
    if not found:
        raise DataError(f"{source!r}: {name} on the hub has no files {pattern}; it may have changed")
    files = [(path, int(found[path]["size"]), lambda path=path: hub.open(path, "rb")) for path in sorted(found)]
    yield from mix_streams(files)  # type: ignore[arg-type]


def read_copy(copy: str, split: str, *, source: str, in_proportion: bool = False) -> Iterator[Row]:
    """Rows of a data set that lies on this machine: a file, a downloaded repository, or a folder of `save_to_disk`.

    Raises:
        DataError: nothing is there, it cannot be read, or it has no such split.
    """
    if is_saved_dataset(copy):
        return _read_saved(copy, split, source)
    files = find_data(copy)
    if Path(copy).expanduser().is_dir():  # a repository holds other splits too
        files = [file for file in files if re.search(rf"(^|[^a-z]){re.escape(split)}([^a-z]|$)", file.name)] or files
    return read_files(files, in_proportion and not any(file.suffix == ".parquet" for file in files))


def _read_saved(folder: str, split: str, source: str) -> Iterator[Row]:
    datasets = _library(source)
    try:
        saved = datasets.load_from_disk(str(Path(folder).expanduser()))
        rows = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read {folder} (split {split!r}): {error}") from error
    for number, row in enumerate(rows):
        yield dict(row), f"{folder} row {number}"


def _library(source: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f'source {source!r} needs the datasets library: pip install "lolcats[data]"') from error
    return datasets


def _why_unreachable(name: str, revision: str | None) -> str | None:
    """None if the hub has the data set, else the reason in a few words. One short question: no retries."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE or _asked_offline():
        return "offline mode is on"
    try:
        HfApi().dataset_info(name, revision=revision, timeout=_TIMEOUT)
    except Exception as error:  # from DNS to permissions: whatever it is, it is told
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {' '.join(lines)[:200]}"
    return None


def _asked_offline() -> bool:
    return os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@contextmanager
def _offline(datasets: ModuleType, wanted: bool) -> Iterator[None]:
    """Let datasets look at its own copies at once, without the half minute of attempts that were made already."""
    from huggingface_hub import constants

    if not wanted:
        yield
        return
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    verbosity = datasets.logging.get_verbosity()
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
        datasets.logging.set_verbosity(verbosity)


def _downloaded(name: str, revision: str | None, source: str, trouble: str) -> str:
    """The folder that `hf download` filled.

    Raises:
        DataError: there is none; the message says where was looked and what to do.
    """
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub import constants, snapshot_download

    try:
        return snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
    except (OSError, ValueError):
        pass
    flags = [f"{flag}={os.environ[flag]}" for flag in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE") if flag in os.environ]
    key = source if not source.startswith("hf:") else name
    raise DataError(
        f"data set {source!r} is missing: it is {name} on the Hugging Face hub, which was not reached ({trouble}; "
        f"{', '.join(flags) or 'HF_DATASETS_OFFLINE is not set'}); no copy in {HF_DATASETS_CACHE}, in "
        f"{constants.HF_HUB_CACHE} or named in data.local. Fetch it where there is a network (hf download --repo-type "
        f"dataset {name} --local-dir FOLDER) and set data.local.{key}=FOLDER"
    )
