"""The exceptions that mean "the user can fix this": wrong settings, wrong data."""

import difflib
from collections.abc import Iterable
from typing import Any, cast


class LolcatsError(ValueError):
    """A mistake in what the user gave; the message says what was expected, what came and what to do.

    Args:
        message: for whoever reads it, in Python or in a shell.
        hint: key of what the command line adds in its own words (`lolcats.cli.failures.HINTS`).
    """

    def __init__(self, message: str = "", *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(LolcatsError):
    """A configuration file, recipe name or override that cannot be used."""


class DataError(LolcatsError):
    """A data source, record, template or token file that cannot be used."""


class NotFiniteError(LolcatsError):
    """A model that computes NaN or infinity."""


def did_you_mean(word: object, known: Iterable[str], otherwise: str) -> str:
    """The end of a message about an unknown word: the nearest one that is known, or `otherwise` where none is near."""
    near = difflib.get_close_matches(str(word), sorted(known), 1)
    return f"did you mean {near[0]}?" if near else otherwise


def first_line(error: BaseException) -> str:
    """What an exception says, in one line: the first of its message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def first_problem(error: Exception) -> str:
    """What is wrong with content that a pydantic model was to hold: where, and what came; of others what they say."""
    listed = getattr(error, "errors", None)  # pydantic itself is not needed by whoever has no such error
    if not callable(listed):
        return str(error)
    first = cast(Any, listed)(include_url=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {str(first['input'])[:40]!r})"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, of the machine or of a GPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)[:1000])  # torch on CPUs
