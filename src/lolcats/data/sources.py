"""Where text comes from: the documentation inside Python, local files, named data sets, and the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pydoc_data.topics import topics

from lolcats.data.files import TEXT_SUFFIXES as TEXT_SUFFIXES
from lolcats.data.files import TOKEN_SUFFIXES as TOKEN_SUFFIXES
from lolcats.data.files import find_data, read_files
from lolcats.data.files import find_files as find_files
from lolcats.data.hub import read_copy, read_hub, read_hub_files
from lolcats.data.named import COLLECTIONS, NAMED, NAMES, NamedSet
from lolcats.data.records import ChatRecord as ChatRecord
from lolcats.data.records import CompletionRecord as CompletionRecord
from lolcats.data.records import InstructionRecord as InstructionRecord
from lolcats.data.records import Message as Message
from lolcats.data.records import Record, Row, choose_columns, to_record
from lolcats.data.records import TextRecord as TextRecord
from lolcats.errors import DataError
from lolcats.settings import SourceConfig

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
    settings = SourceConfig(name=source) if isinstance(source, str) else source
    if settings.name in COLLECTIONS:
        for name in COLLECTIONS[settings.name]:
            yield from iter_records(settings.model_copy(update={"name": name}), local)
        return
    named = NAMED.get(settings.name)
    convert = named.convert if named is not None and not settings.columns else to_record
    limit = settings.limit or (named.limit if named else None)
    empty = True
    for row, where in islice(_rows(settings, named, local or {}), limit):
        record = convert(choose_columns(row, settings.columns, where), where)
        if "text" not in record or record["text"].strip():
            empty = False
            yield record
    if empty:
        raise DataError(f"source {settings.name!r} holds no text; expected at least one document that is not blank")


def _rows(settings: SourceConfig, named: NamedSet | None, local: Mapping[str, str]) -> Iterator[Row]:
    source = settings.name
    if source == "python-docs":
        return (({"text": topics[name]}, f"topic {name}") for name in sorted(topics))
    if source in ("passkey", "self"):
        raise DataError(f"source {source!r} is made for a run (data.sources) and cannot be read here")
    if (copy := local_copy(source, local)) is not None:
        return read_copy(
            copy, hub_place(source)[2], source=source, in_proportion=named is not None and bool(named.files)
        )
    if named is not None and named.files:
        return read_hub_files(named.hub, named.files, source=source, revision=settings.revision)
    if named is not None or source.startswith("hf:"):
        name, config, split = hub_place(source)
        streaming = settings.streaming
        if streaming is None:  # what is read whole is better kept by datasets for the next time
            streaming = named is None or named.streaming
        return read_hub(name, config, split, source=source, revision=settings.revision, streaming=streaming)
    return read_files(find_data(source, HINT))


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
