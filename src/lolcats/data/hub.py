"""Rows of data sets of the Hugging Face hub, and a plain word where they cannot be had."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lolcats.data.copies import hushed, in_words, library, read_copy
from lolcats.data.files import mix_streams
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
    `hf download` made: the same configuration and split, or nothing.

    Args:
        name: OWNER/NAME, or a folder.
        source: what the user called it, for messages.
        streaming: fetch rows while they are read: reading fewer fetches less.

    Raises:
        DataError: it cannot be reached and there is no copy; or it cannot be loaded.
    """
    if os.path.exists(Path(name).expanduser()):
        if revision is not None:
            raise DataError(f"source {source!r} is on this machine and has no revision {revision}; leave revision out")
        yield from read_copy(name, config, split, source=source)
        return
    datasets = library(source)
    trouble = _why_unreachable(name, revision)
    if trouble is not None:
        yield from _read_kept(datasets, name, config, split, source=source, revision=revision, trouble=trouble)
        return
    try:
        rows = datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # datasets, its readers and the network have no common class of errors
        raise DataError(f"cannot load {source!r}: {in_words(error)}") from error
    yield from _numbered(rows, source)


def _read_kept(
    datasets: ModuleType, name: str, config: str | None, split: str, *, source: str, revision: str | None, trouble: str
) -> Iterator[Row]:
    """Rows of what datasets keeps, if it is of this configuration and revision, else of what `hf download` fetched."""
    try:
        with _offline(datasets), hushed(datasets):
            builder = datasets.load_dataset_builder(name, config)
            if revision not in (None, builder.hash):
                raise DataError(f"what datasets keeps of it is of revision {builder.hash}, not {revision}")
            rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # as in read_hub
        copy = _downloaded(name, revision, source, trouble, error)
        # The folder is of the revision: it was looked for by it.
        yield from read_copy(copy, config, split, source=source)
        return
    yield from _numbered(rows, source)


def _numbered(rows: Any, source: str) -> Iterator[Row]:
    number = 0
    try:
        for row in rows:
            yield dict(row), f"{source} row {number}"
            number += 1
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"reading {source!r} broke off at row {number} ({in_words(error)}); run again to go on"
        ) from error


def read_hub_files(name: str, pattern: str, *, source: str, revision: str | None = None) -> Iterator[Row]:
    """Rows of the .jsonl files of a data set, side by side, see `mix_streams`; nothing is stored.

    Raises:
        DataError: the hub is out of reach, or has no such files.
    """
    library(source)
    if (trouble := _why_unreachable(name, revision)) is not None:
        copy = _downloaded(name, revision, source, trouble)
        yield from read_copy(copy, None, "train", source=source, pattern=pattern)
        return
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem()
    place = f"datasets/{name}" + (f"@{revision}" if revision else "")
    try:
        found: dict[str, Any] = dict(hub.glob(f"{place}/{pattern}", detail=True))  # type: ignore[arg-type]
    except Exception as error:
        raise DataError(f"cannot list the files of {source!r}: {in_words(error)}") from error
    if not found:
        raise DataError(f"{source!r}: {name} on the hub has no files {pattern}; it may have changed")
    files = [(path, int(found[path]["size"]), lambda path=path: hub.open(path, "rb")) for path in sorted(found)]
    yield from mix_streams(files)  # type: ignore[arg-type]


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
def _offline(datasets: ModuleType) -> Iterator[None]:
    """Let datasets look at its own copies at once, without the half minute of attempts that were made already."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _downloaded(name: str, revision: str | None, source: str, trouble: str, kept: Exception | None = None) -> str:
    """The folder that `hf download` filled.

    Args:
        kept: why what datasets keeps would not do.

    Raises:
        DataError: there is none; the message says where was looked and what to do.
    """
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub import constants, snapshot_download

    try:
        return snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
    except (OSError, ValueError):
        pass
    found = f" ({in_words(kept)})" if isinstance(kept, ValueError) else ""  # else nothing is there
    flags = [f"{flag}={os.environ[flag]}" for flag in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE") if flag in os.environ]
    key = source if not source.startswith("hf:") else name
    raise DataError(
        f"data set {source!r} is missing: it is {name} on the Hugging Face hub, which was not reached ({trouble}; "
        f"{', '.join(flags) or 'HF_DATASETS_OFFLINE is not set'}); no copy in {HF_DATASETS_CACHE}{found}, in "
        f"{constants.HF_HUB_CACHE} or named in data.local. Fetch it where there is a network (hf download --repo-type "
        f"dataset {name} --local-dir FOLDER) and set data.local.{key}=FOLDER"
    )
