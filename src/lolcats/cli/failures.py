"""What goes wrong, in one line."""

from __future__ import annotations

import os
import sys
from typing import Any, cast

from lolcats.errors import LolcatsError, is_out_of_memory
from lolcats.printable import MOST_PROBLEMS, one_line

INTERRUPTED = {
    "bench": "interrupted; rows that were measured are above and in the files",
    "linearize": "interrupted; the last checkpoint is kept",
    "generate --input": "interrupted; finished rows are kept: the same command goes on from there",
    "benchmark": "interrupted; what was measured is kept: the same command goes on from there",
    "recall": "interrupted; what was measured is kept: the same command goes on from there",
    "sweep": "interrupted; finished runs and last checkpoints are kept, and the same command goes on with them",
}
"""What a verb says after Ctrl-C, where it is more than "interrupted"."""
HINTS = {
    "base": "--base NAME",
    "batch_size": "--batch-size N",
    "beyond_context": "--beyond-context of lolcats recall and lolcats bench",
    "chat": "--chat",
    "fewer_examples": "--num-fewshot TASK=N, in a sweep measure.num_fewshot",
    "finish_run": "lolcats linearize CONFIG --resume",
    "generate": "lolcats generate",
    "jobs": "--jobs N",
    "overwrite": "--overwrite",
    "overwrite_runs": "--overwrite RUN",
    "resume_or_overwrite": "--resume or --overwrite",
    "sources": "--sources",
    "task_code": "lolcats benchmark --task-code",
    "task_data": "--task-data DIR, in a sweep measure.task_data=DIR",
    "truncate": "--num-fewshot or lolcats benchmark --truncate",
}
"""Key of a `LolcatsError` -> what does here what its message says."""


class Interrupted(Exception):
    """Ctrl-C inside a verb."""

    def __init__(self, verb: str) -> None:
        super().__init__(verb)
        self.verb = verb


def describe(error: Exception) -> str:
    """One printable line of bounded length for the person who typed the command."""
    if is_usage_error(error):
        return f"{one_line(error.format_message())} (lolcats --help shows the options)"  # type: ignore[attr-defined]
    pydantic: Any = sys.modules.get("pydantic")  # --help need not import it
    if pydantic is not None and isinstance(error, pydantic.ValidationError):
        problems = cast(Any, error).errors(include_url=False)[:MOST_PROBLEMS]
        return one_line("\n".join(_problem(p) for p in problems))
    if isinstance(error, LolcatsError):
        return one_line(str(error) + (f" ({HINTS[error.hint]})" if error.hint else ""))
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return one_line(f"{error.filename}: {reason}" if error.filename else reason)
    if is_out_of_memory(error):
        return "out of memory; use smaller batches, shorter sequences or a smaller model"
    return f"unexpected {type(error).__name__}: {one_line(str(error))} (--debug shows where)"


def _problem(problem: Any) -> str:
    """One of pydantic's; those of a whole object, as vLLM's settings are one, have no place."""
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {problem['msg']}" if place else problem["msg"].removeprefix("Value error, ")


def is_usage_error(error: Exception) -> bool:
    """Whether typer could not understand the command."""
    return hasattr(error, "format_message")


def process_prefix() -> str:
    """Empty in the main process; the others of a distributed run say who they are."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[process {rank}] "


def close_stdout() -> int:
    """The reader of our output went away (`lolcats ... | head`): stop without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
