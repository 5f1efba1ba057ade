"""The library says what to do, the command line by which words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import lolcats
from lolcats.cli.failures import HINTS, describe
from lolcats.errors import DataError

ROOT = Path(lolcats.__file__).parent
OTHERS = {
    "data/hub.py": "hf download", "sweep/jobs.py": "sweep-job", "serving/server.py": "of vLLM, as on its command line",
    "planning/commands.py": "torchrun", "runs/blocks/jobs.py": "lolcats linearize", "runs/blocks/work.py": "command(",
    "report/subject.py": '"lolcats", verb',
}  # fmt: skip
"""File -> whole commands that it tells or starts, of which options are a part."""


def sources() -> list[Path]:
    return [file for file in ROOT.rglob("*.py") if "cli" not in file.relative_to(ROOT).parts]


def test_no_options_in_messages_of_the_library() -> None:
    for file in sources():
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = re.findall(r"(?<![\w-])--[a-z][a-z-]+", node.value)
                assert not found or OTHERS.get(file.relative_to(ROOT).as_posix(), "?") in text, f"{file}: {found}"


def test_every_hint_has_words_and_every_word_is_needed() -> None:
    used = {key for file in sources() for key in re.findall(r'hint="(\w+)"', file.read_text(encoding="utf-8"))}
    used |= {"beyond_context", "task_data"}  # chosen by a condition
    assert used == set(HINTS)


def test_the_words_follow_the_message() -> None:
    assert describe(DataError("too long; use fewer", hint="truncate")) == f"too long; use fewer ({HINTS['truncate']})"
