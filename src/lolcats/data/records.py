"""The four shapes of a record, and how a row of a data set becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, final

from lolcats.errors import DataError

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
Row = tuple[dict[str, Any], str]  # what a data set holds, and where it was read


def to_record(row: dict[str, Any], where: str) -> Record:
    """Find the shape of a row; other keys are dropped.

    Raises:
        DataError: none of the shapes, or a value of the wrong type.
    """
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


def choose_columns(row: dict[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """The columns that `columns` names (key of a record -> key of the row), or the whole row where it is empty.

    Raises:
        DataError: the row has no such column.
    """
    if missing := [name for name in columns.values() if name not in row]:
        raise DataError(f"{where}: no column {missing[0]!r} (asked for by `columns`), got the keys {sorted(row)}")
    return {key: row[name] for key, name in columns.items()} if columns else row


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
