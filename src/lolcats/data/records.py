"""The four shapes of a record, and how a row of a data set becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, final

from lolcats.data.turns import Message as Message
from lolcats.data.turns import check_text, read_tools, read_turns
from lolcats.errors import DataError

_SHAPES = '"text", "instruction" and "output", "prompt" and "completion", or "messages" (or "conversations")'
_TURN_KEYS = ("role", "content")


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


class _Conversation(TypedDict):
    messages: list[Message]


@final
class ChatRecord(_Conversation, total=False):
    """A conversation of at least one message, and the tools that it may use."""

    tools: list[dict[str, Any]]


Record = TextRecord | InstructionRecord | CompletionRecord | ChatRecord
Row = tuple[dict[str, Any], str]  # what a data set holds, and where it was read


def to_record(row: dict[str, Any], where: str, keys: Mapping[str, str] | None = None) -> Record:
    """Find the shape of a row; other keys are dropped.

    Args:
        row: of a data set.
        where: file and line, for messages.
        keys: what turns of a conversation call "role" and "content".

    Raises:
        DataError: none of the shapes, or a value of the wrong type.
    """
    # Data sets that carry an instruction and its rendered "text" are read by their parts, so that a template applies.
    # A table has every column in every row: what is null is not there.
    there = {key: value for key, value in row.items() if value is not None} or row
    for key in ("messages", "conversations"):
        if key in there:
            system = check_text(there.get("system", ""), "system", where)
            return _conversation(read_turns(there, key, where, keys, system), there, where)
    if "instruction" in there:
        row = {**row, "input": row.get("input") or ""}
        instruction, given, output = (_text(row, key, where) for key in ("instruction", "input", "output"))
        return {"instruction": instruction, "input": given, "output": output}
    if "chosen" in there and "completion" not in there and "text" not in there:
        raise DataError(_preference(there, where))
    if "prompt" in there:
        return _completion(there, where, keys)
    if "text" in row:
        return {"text": _text(row, "text", where)}
    raise DataError(f"{where}: expected {_SHAPES}, got the keys {sorted(map(str, row))}")


def _conversation(messages: list[Message], row: dict[str, Any], where: str) -> ChatRecord:
    record: ChatRecord = {"messages": messages}
    if tools := read_tools(row, where):
        record["tools"] = tools
    return record


def _completion(row: dict[str, Any], where: str, keys: Mapping[str, str] | None) -> Record:
    """Prompt and completion, which are both texts, or conversations that go on from one to the other."""
    parts = {key: row.get(key) for key in ("prompt", "completion")}
    if not any(isinstance(part, list) for part in parts.values()):
        return {"prompt": _text(row, "prompt", where), "completion": _text(row, "completion", where)}
    turns = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        part = parts[key]
        turns.append(
            read_turns(row, key, where, keys)
            if isinstance(part, list)
            else [{"role": role, "content": _text(row, key, where)}]
        )
    prompt, answer = turns
    if [turn["role"] for turn in answer] != ["assistant"]:
        roles = ", ".join(turn["role"] for turn in answer)
        raise DataError(f'{where}: "completion" must be one message of the assistant, got {roles}')
    return _conversation([*prompt, *answer], row, where)


def _preference(row: dict[str, Any], where: str) -> str:
    """What to do with a pair of answers of which one is preferred."""
    if isinstance(row["chosen"], list):
        way = "{messages: chosen}"
    else:
        way = "{prompt: prompt, completion: chosen}" if "prompt" in row else "{text: chosen}"
    return f"{where}: the row is a preference, chosen and rejected; to train on what was chosen set columns: {way}"


def choose_columns(row: dict[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """The columns that `columns` names (key of a record -> key of the row), or the whole row where it names none.

    Raises:
        DataError: the row has no such column.
    """
    wanted = {key: name for key, name in columns.items() if key not in _TURN_KEYS}
    if missing := [name for name in wanted.values() if name not in row]:
        keys = sorted(map(str, row))
        raise DataError(f"{where}: no column {missing[0]!r} (asked for by `columns`), got the keys {keys}")
    return {key: row[name] for key, name in wanted.items()} if wanted else row


def turn_keys(columns: Mapping[str, str]) -> dict[str, str]:
    """What `columns` says of the turns of a conversation: other names of "role" and "content"."""
    return {key: columns[key] for key in _TURN_KEYS if key in columns}


def _text(row: dict[str, Any], key: str, where: str) -> str:
    return check_text(row.get(key), key, where)
