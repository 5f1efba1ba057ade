"""lm-eval's index of its tasks, kept on disk: building it means to read some ten thousand small files.

CACHE/lm-eval/STAMP.pickle   the index of an installation whose definitions have this stamp

The stamp depends on the path, time and size of every definition, and on the version of lm-eval, so that a changed
definition, or another lm-eval, is read anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import lm_eval.tasks
from lm_eval.tasks import TaskManager

from lolcats.errors import LolcatsError
from lolcats.files import cache_root, write_bytes


def task_manager() -> TaskManager:
    """lm-eval's own, from the cache where it is there. A cache that cannot be read or written does not matter."""
    folder = cache_root() / "lm-eval"
    file = folder / f"{_stamp(Path(lm_eval.tasks.__file__).parent)}.pickle"
    try:
        found = pickle.loads(file.read_bytes())
        if isinstance(found, TaskManager):
            return found
    except Exception:  # no file, half a file, or classes that lm-eval has no more: it raises all kinds
        pass
    manager = TaskManager()
    _keep(file, manager)
    return manager


def _stamp(root: Path) -> str:
    digest = hashlib.sha256(f"{importlib.metadata.version('lm_eval')} pickle 1".encode())
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


def _keep(file: Path, manager: TaskManager) -> None:
    """Write the file in place of that of another stamp."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, pickle.dumps(manager))
        for old in file.parent.glob("*.pickle"):
            if old != file:
                old.unlink(missing_ok=True)
    except (LolcatsError, OSError, pickle.PicklingError, AttributeError, TypeError):
        return
