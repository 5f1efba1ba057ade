"""Conversations as data sets write them: their turns as messages with a role and a content."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from lolcats.errors import DataError

Message = dict[str, Any]  # one turn: "role" and "content", and what a chat template may show of EXTRAS

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""What ShareGPT and its descendants write under "from", and the role of it."""
EXTRAS = ("tool_calls", "reasoning_content", "thinking")
"""Parts of a turn beside its content that are text for the model, so a template must show them."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60
_LABELS = ("tool_call_id", "name")  # of the answers of tools; templates may use them
_REFUSED = ("history", "images", "videos", "audios", "documents", "chat_template_kwargs")

_UNSHOWN = ("function_call", "images", "audio")  # of a turn


def read_turns(
    row: Mapping[str, Any], key: str, where: str, keys: Mapping[str, str] | None = None, prefix: str = ""
) -> list[Message]:
    """The messages under a key of a row.

    Args:
        row: of a data set.
        key: where the turns are.
        where: file and line, for messages.
        keys: what the turns call "role" and "content"; None takes these, or "from" and "value".
        prefix: text of the system that stands before them, "" for none.

    Raises:
        DataError: no turns, or a turn with something in it that is no text.
    """
    turns = row[key]
    if not isinstance(turns, Sequence) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f'{where}: "{key}" must be a list of {{"role", "content"}} objects, got {shorten(turns)}')
    messages = [_read_turn(turn, where, keys or {}) for turn in turns]
    if prefix and messages[0]["role"] != "system":
        return [{"role": "system", "content": prefix}, *messages]
    return messages


def read_tools(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The descriptions of tools beside a conversation, as a list or as JSON; empty if there are none.

    Raises:
        DataError: something else, or another column that a conversation depends on and that cannot be shown.
    """
    if names := [name for name in _REFUSED if row.get(name)]:
        raise DataError(
            f'{where}: the conversation comes with "{names[0]}", which cannot be shown to the model; leave such rows '
            "out, or choose the columns that are text (`columns`)"
        )
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f'{where}: "tools" is no JSON ({error})') from error
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f'{where}: "tools" must be a list of objects, got {shorten(tools)}')
    return tools


def _read_turn(turn: Mapping[str, Any], where: str, keys: Mapping[str, str]) -> Message:
    shared = "from" in turn and "role" not in turn and not keys
    role_key = keys.get("role", "from" if shared else "role")
    content_key = keys.get("content", "value" if shared else "content")
    role = check_text(turn.get(role_key), role_key, where)
    if shared and role not in _SPEAKERS:
        raise DataError(f'{where}: "from" is {role!r}; expected one of {", ".join(_SPEAKERS)}')
    if names := [name for name in _UNSHOWN if turn.get(name)] or ["weight"] * (turn.get("weight") == 0):
        raise DataError(f'{where}: a turn comes with "{names[0]}", which cannot be followed; leave such rows out')
    calls = turn.get("tool_calls")
    if calls and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise DataError(f'{where}: "tool_calls" must be a list of objects, got {shorten(calls)}')
    extras = {name: turn[name] for name in (*EXTRAS, *_LABELS) if turn.get(name)}
    content = turn.get(content_key)
    if content is None and "tool_calls" in extras:
        content = ""
    role = _SPEAKERS.get(role, role) if shared or keys else role
    return {"role": role, "content": _content(content, content_key, where), **extras}


def _content(content: object, key: str, where: str) -> str:
    """Text, or the text of a list of parts."""
    if not isinstance(content, list):
        return check_text(content, key, where)
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise DataError(f'{where}: "{key}" has a part of type {shorten(kind)}; only text can be read')
        parts.append(check_text(text, key, where))
    return "".join(parts)


def shorten(value: object) -> str:
    """A value as Python writes it, at most 60 characters of it, however deep it is nested."""
    return _SHORT.repr(value)[:60]


def check_text(value: object, key: str, where: str) -> str:
    """The value, if it is text that can be encoded; raises DataError otherwise."""
    if not isinstance(value, str):
        raise DataError(f'{where}: "{key}" must be text, got {shorten(value)}')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair; tokenizers fail on it without a word about where it is.
        raise DataError(f'{where}: "{key}" holds a broken character ({error.reason})') from error
    return value
