"""Where text comes from: the documentation inside Python, local files, and the Hugging Face hub."""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, TypedDict, final

from lolcats.errors import DataError

TEXT_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
TOKEN_SUFFIXES = (".u16", ".u32", ".bin")
_SHAPES = '"text", "instruction" and "output", "prompt" and "completion", or "messages"'


Message = dict[str, str]  # one turn of a conversation: "role" and "content"


@final
class TextRecord(TypedDict):
    """A document without parts."""

    text: str


@final
class InstructionRecord(TypedDict):
    """An instruction in the manner of Alpaca; `input` may be empty."""

    instruction: str
    input: str
    output: str


@final
class CompletionRecord(TypedDict):
    """A prompt and its answer."""

    prompt: str
    completion: str


@final
class ChatRecord(TypedDict):
    """A conversation of at least one message."""

    messages: list[Message]


Record = TextRecord | InstructionRecord | CompletionRecord | ChatRecord


def iter_records(source: str) -> Iterator[Record]:
    """Read the documents of one source in a fixed order; blank texts are left out.

    Args:
        source: "python-docs" (the help topics that every Python ships); a .txt or .txt.gz file (one document);
            a .jsonl or .jsonl.gz file (one object a line); a folder or glob of such files, read in sorted order; or
            "hf:NAME[:CONFIG[:SPLIT]]" (needs the extra `data`; the split is "train" unless given, and rows are
            fetched as they are read).

    Yields:
        Plain dictionaries of one of the four shapes of `Record`; other keys of a JSON object are dropped.

    Raises:
        DataError: nothing found, nothing in it, or a broken row, named as file:line.
    """
    if source == "python-docs":
        rows: Iterable[Record] = (TextRecord(text=topics[name]) for name in sorted(topics))
    elif source.startswith("hf:"):
        rows = _read_hub(source)
    else:
        rows = chain.from_iterable(map(_read_file, find_files(source, TEXT_SUFFIXES)))
    empty = True
    for record in rows:
        if "text" not in record or record["text"].strip():
            empty = False
            yield record
    if empty:
        raise DataError(f"source {source!r} holds no text; expected at least one document that is not blank")


def find_files(source: str, suffixes: tuple[str, ...]) -> list[Path]:
    """List the files that a path, folder (with its sub-folders) or glob names, sorted, kept by file name ending.

    Raises:
        DataError: no such file, or none with one of `suffixes`.
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
        raise DataError(f'source {source!r} {what}; give a path, a folder, a glob, "python-docs" or "hf:NAME"')
    return files


def _read_file(path: Path) -> Iterator[Record]:
    with _reading(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as raw:
        lines = io.TextIOWrapper(raw, encoding="utf-8-sig")  # type: ignore[arg-type]
        if path.name.removesuffix(".gz").endswith(".txt"):
            yield {"text": lines.read()}
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse_line(line, f"{path}:{number}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _parse_line(line: str, where: str) -> Record:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON ({error}); expected one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {line.strip()!r:.60}")
    return _to_record(row, where)


def _to_record(row: dict[str, Any], where: str) -> Record:
    # Data sets that carry an instruction and its rendered "text" are read by their parts, so that a template applies.
    if "messages" in row:
        return {"messages": _messages(row["messages"], where)}
    if "instruction" in row:
        row = {**row, "input": row.get("input") or ""}
        return {
            "instruction": _text(row, "instruction", where),
            "input": _text(row, "input", where),
            "output": _text(row, "output", where),
        }
    if "prompt" in row:
        return {"prompt": _text(row, "prompt", where), "completion": _text(row, "completion", where)}
    if "text" in row:
        return {"text": _text(row, "text", where)}
    raise DataError(f"{where}: expected {_SHAPES}, got the keys {sorted(row)}")


def _messages(turns: object, where: str) -> list[Message]:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f'{where}: "messages" must be a list of {{"role", "content"}} objects, got {turns!r:.60}')
    return [{"role": _text(turn, "role", where), "content": _text(turn, "content", where)} for turn in turns]


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f'{where}: "{key}" must be text, got {value!r:.60}')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair; tokenizers fail on it without a word about where it is.
        raise DataError(f'{where}: "{key}" holds a broken character ({error.reason})') from error
    return value


def _read_hub(source: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f'source {source!r} needs the datasets library: pip install "lolcats[data]"') from error
    name, config, split, *rest = [*source.removeprefix("hf:").split(":"), "", ""]
    if not name or any(rest):
        raise DataError(f'source {source!r} is not of the form "hf:NAME[:CONFIG[:SPLIT]]"')
    try:
        # Streaming: a cap on tokens then caps the download too.
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot load {source!r}: {error}") from error
    for number, row in enumerate(rows):
        yield _to_record(dict(row), f"{source} row {number}")
