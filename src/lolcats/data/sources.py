"""Where text comes from: the documentation inside Python, local files, named data sets, and the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

from lolcats.config import SourceConfig
from lolcats.data.copies import read_copy, read_saved
from lolcats.data.files import TEXT_SUFFIXES as TEXT_SUFFIXES
from lolcats.data.files import TOKEN_SUFFIXES as TOKEN_SUFFIXES
from lolcats.data.files import find_data, has_ending, is_saved_dataset, read_files
from lolcats.data.files import find_files as find_files
from lolcats.data.hub import read_hub, read_hub_files
from lolcats.data.named import COLLECTIONS, NAMED, NAMES, NamedSet
from lolcats.data.records import ChatRecord as ChatRecord
from lolcats.data.records import CompletionRecord as CompletionRecord
from lolcats.data.records import InstructionRecord as InstructionRecord
from lolcats.data.records import Message as Message
from lolcats.data.records import Record, Row, choose_columns, to_record, turn_keys
from lolcats.data.records import TextRecord as TextRecord
from lolcats.errors import DataError

HINT = f', a named data set ({", ".join(NAMES)}), or "hf:NAME"'


def iter_records(source: str | SourceConfig, local: Mapping[str, str] | None = None) -> Iterator[Record]:
    """Read the documents of one source in a fixed order; blank texts are left out.

    Args:
        source: "python-docs" (the help topics that every Python ships); a name of `lolcats.data.named`; a .txt or
            .txt.gz file (one document); a .jsonl or .jsonl.gz file (one object a line), a .json file (a list of
            objects) or a .parquet file; a folder or glob of such files, read in sorted order; or
            "hf:NAME[:CONFIG[:SPLIT]]" (needs the extra `data`; the split is "train" unless given, and rows are
            fetched as they are read).
        local: names of data sets, or of hub repositories, and the files or folders that are read in their place.

    Yields:
        Plain dictionaries of one of the four shapes of `Record`; other keys of a JSON object are dropped.

    Raises:
        DataError: nothing found, nothing in it, or a broken row, named as file:line.
    """
    return (record for record, _ in iter_placed(source, local))


def iter_placed(source: str | SourceConfig, local: Mapping[str, str] | None = None) -> Iterator[tuple[Record, str]]:
    """As `iter_records`, each with where it was read: file:line, or the row of a data set."""
    settings = SourceConfig(name=source) if isinstance(source, str) else source
    if settings.name in COLLECTIONS:
        for name in COLLECTIONS[settings.name]:
            yield from iter_placed(settings.model_copy(update={"name": name}), local)
        return
    check_settings(settings)
    named, keys = NAMED.get(settings.name), turn_keys(settings.columns)
    limit = settings.limit or (named.limit if named else None)
    empty = True
    for row, where in islice(_rows(settings, named, local or {}), limit):
        chosen = choose_columns(row, settings.columns, where)
        record = named.convert(row, where) if named and not settings.columns else to_record(chosen, where, keys)
        if "text" not in record or record["text"].strip():
            empty = False
            yield record, where
    if empty:
        raise DataError(f"source {settings.name!r} holds no text; expected at least one document that is not blank")


def _rows(settings: SourceConfig, named: NamedSet | None, local: Mapping[str, str]) -> Iterator[Row]:
    source = settings.name
    if source == "python-docs":
        return (({"text": topics[name]}, f"topic {name}") for name in sorted(topics))
    if source in ("passkey", "self"):
        raise DataError(f"source {source!r} is made for a run (data.sources) and cannot be read here")
    if (copy := local_copy(source, local)) is not None:
        _, config, split = hub_place(source)
        pattern = named.files if named is not None else None
        return read_copy(copy, config, split, source=source, revision=settings.revision, pattern=pattern)
    if named is not None and named.files:
        return read_hub_files(named.hub, named.files, source=source, revision=settings.revision)
    if named is not None or source.startswith("hf:"):
        name, config, split = hub_place(source)
        streaming = settings.streaming
        if streaming is None:  # what is read whole is better kept by datasets for the next time
            streaming = named is None or named.streaming
        return read_hub(name, config, split, source=source, revision=settings.revision, streaming=streaming)
    if is_saved_dataset(source):
        return read_saved(source)
    return read_files(find_data(source, HINT))


def check_source(source: str | SourceConfig, local: Mapping[str, str]) -> None:
    """See that what a source names is on this machine, unless it is on the hub; nothing is read yet.

    Raises:
        DataError: a file, configuration or split that is missing, or settings that the source does not take.
    """
    settings = SourceConfig(name=source) if isinstance(source, str) else source
    for name in COLLECTIONS.get(settings.name, ()):
        check_source(settings.model_copy(update={"name": name}), local)
    source, named = settings.name, NAMED.get(settings.name)
    check_settings(settings)
    if has_ending(source, TOKEN_SUFFIXES):
        find_files(source, TOKEN_SUFFIXES, HINT)
    elif (copy := local_copy(source, local)) is not None:
        try:
            _rows(settings, named, local)
        except DataError as error:
            raise DataError(f"data.local names {copy} for {source!r}, but {error}") from error
    elif source.startswith("hf:"):
        name, config, split = hub_place(source)
        if os.path.exists(Path(name).expanduser()):
            read_copy(name, config, split, source=source)
    elif source not in NAMES:
        _rows(settings, named, local)


def check_settings(settings: SourceConfig) -> None:
    """Refuse settings that would be ignored.

    Raises:
        DataError: settings that another kind of source takes.
    """
    name = settings.name
    on_hub = name.startswith("hf:") or name in NAMED or name in COLLECTIONS
    kinds = {
        "of the hub": (on_hub, ["revision", "streaming"]),
        "passkey and self": (name in ("passkey", "self"), ["length"]),
        "of text": (name != "passkey" and not has_ending(name, TOKEN_SUFFIXES), ["template"]),
        "of records": (name not in ("passkey", "self") and not has_ending(name, TOKEN_SUFFIXES), ["columns"]),
        "that are not token files": (not has_ending(name, TOKEN_SUFFIXES), ["limit"]),
    }
    for kind, (fits, keys) in kinds.items():
        given = [key for key in keys if getattr(settings, key) not in (None, {})]
        if given and not fits:
            raise DataError(f"source {name!r} does not take {given[0]}, which goes with sources {kind}; leave it out")
    if on_hub and settings.revision is not None and os.path.exists(Path(hub_place(name)[0]).expanduser()):
        raise DataError(f"source {name!r} is on this machine and has no revisions; leave revision out")


def hub_place(source: str) -> tuple[str, str | None, str]:
    """Name, configuration and split on the hub of a named data set or of "hf:NAME[:CONFIG[:SPLIT]]".

    Raises:
        DataError: not of this form.
    """
    if source in NAMED:
        return NAMED[source].hub, None, "train"
    name, config, split, *rest = [*source.removeprefix("hf:").split(":"), "", ""]
    if not name or any(rest):
        raise DataError(f'source {source!r} is not of the form "hf:NAME[:CONFIG[:SPLIT]]"')
    return name, config or None, split or "train"


def local_copy(source: str, local: Mapping[str, str]) -> str | None:
    """What `data.local` gives in place of a data set: under its own name, or under the hub's."""
    if source not in NAMED and not source.startswith("hf:"):
        return None
    return local.get(source, local.get(hub_place(source)[0]))
