"""lm-eval's index of its tasks, kept on disk: building it means to read some ten thousand small files.

CACHE/lm-eval/STAMP.json   the index of an installation whose definitions have this stamp

The stamp depends on the path, time and size of every definition, and on the version of lm-eval, so that a changed
definition, or another lm-eval, is read anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager, manager
from lm_eval.tasks._index import Entry, Kind

from lolcats.errors import LolcatsError
from lolcats.files import cache_root, write_bytes


def task_manager() -> TaskManager:
    """lm-eval's own, from the cache where it is there. A cache that cannot be read or written does not matter."""
    root = Path(lm_eval.tasks.__file__).parent
    file = cache_root() / "lm-eval" / f"{_stamp(root)}.json"
    try:
        index = _decode(json.loads(file.read_bytes()), root)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        made = TaskManager()
        _keep(file, made.task_index, root)
        return made
    return _from_index(index)


def _from_index(index: dict[str, Entry]) -> TaskManager:
    """lm-eval's manager, with an index in place of the one that it would build."""
    original = manager.TaskIndex
    manager.TaskIndex = lambda: SimpleNamespace(build=lambda paths: index)  # type: ignore[assignment, misc]
    try:
        return TaskManager()
    finally:
        manager.TaskIndex = original  # type: ignore[misc]


def _stamp(root: Path) -> str:
    digest = hashlib.sha256(f"{importlib.metadata.version('lm_eval')} json 1".encode())
    for entry in _definitions(str(root)):
        status = entry.stat()
        digest.update(f"{entry.path} {status.st_mtime_ns} {status.st_size}\n".encode())
    return digest.hexdigest()[:20]


def _definitions(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir():
                yield from _definitions(entry.path)
            elif entry.name.endswith(".yaml"):
                yield entry


def _encode(index: dict[str, Entry], root: Path) -> list[Any]:
    """An entry as [name, kind, path under `root`, settings, tags]."""
    return [
        [e.name, e.kind.name, e.yaml_path and e.yaml_path.relative_to(root).as_posix(), e.cfg, sorted(e.tags)]
        for e in index.values()
    ]


def _decode(entries: list[Any], root: Path) -> dict[str, Entry]:
    """Undo `_encode`; raises ValueError, LookupError, TypeError or AttributeError where that did not write it."""
    index: dict[str, Entry] = {}
    for name, kind, path, settings, tags in entries:
        if not isinstance(name, str) or not isinstance(settings, dict | None):
            raise TypeError("not an entry")
        if path is not None and (PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts):
            raise ValueError("a definition that is not lm-eval's")  # whose code would be run
        index[name] = Entry(name, Kind[kind], None if path is None else root / path, settings, set(tags))
    return index


def _keep(file: Path, index: dict[str, Entry], root: Path) -> None:
    """Write the file in place of that of another stamp, if JSON can hold the index."""
    try:
        content = json.dumps(_encode(index, root))
        if _decode(json.loads(content), root) != index:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, content.encode())
        for old in [*file.parent.glob("*.json"), *file.parent.glob("*.pickle")]:  # pickle: of version 0.1.0
            if old != file:
                old.unlink(missing_ok=True)
    except (LolcatsError, OSError, ValueError, TypeError):
        return
