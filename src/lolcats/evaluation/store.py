"""Finished answers on disk, so that an evaluation or a batch job that was interrupted goes on where it was."""

from __future__ import annotations

import json
import sqlite3
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from lolcats.errors import LolcatsError
from lolcats.files import cache_root
from lolcats.identity import key_of


class AnswerStore:
    """Answers under keys, each on disk before the next is computed.

    A key names all that an answer depends on, so a changed model or setting finds nothing under it. Benchmarks,
    recall tasks and batch jobs of any model may share a file.

    Args:
        file: an SQLite database, made when missing; None keeps everything in memory.

    Raises:
        LolcatsError: the file cannot be written, or is something else.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        try:
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(":memory:" if file is None else file)
            weakref.finalize(self, self._database.close)  # newer Pythons warn of one that is left open
            self._database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._database.commit()
        except (sqlite3.Error, OSError) as error:
            raise LolcatsError(
                f"{file} cannot hold finished answers: {error}; move it away, or write elsewhere"
            ) from error

    def get(self, key: str) -> Any:
        """The answer under a key, None where there is none."""
        try:
            row = self._database.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
            return None if row is None else json.loads(row[0])
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise LolcatsError(f"{self.file} is damaged ({error}); delete it: what it held is done anew") from error

    def put(self, key: str, value: Any) -> None:
        """Keep an answer; it is on disk when this returns. Numbers come back exactly as they were."""
        try:
            with self._database:
                self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(value)))
        except sqlite3.Error as error:
            raise LolcatsError(f"cannot write {self.file}: {error}") from error

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the file, and delete it if nothing is left to do (nothing was raised) or nothing was done."""
        done = kind is None
        with suppress(sqlite3.Error):
            done = done or self._database.execute("SELECT 1 FROM answers LIMIT 1").fetchone() is None
        self._database.close()
        if done and self.file is not None:
            self.file.unlink(missing_ok=True)


def default_file(*names: object) -> Path:
    """Where answers are kept when no other place was given: in the cache folder, a file for each `names`."""
    return cache_root() / "evaluations" / f"{key_of(*names)[:16]}.progress"
