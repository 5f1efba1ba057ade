"""The tasks that lm-eval knows: which names exist, what contains what, and where each task's data come from.

lm-eval's index of them is kept on disk, because building it means to read some ten thousand small files:
CACHE/lm-eval/STAMP.json. The stamp depends on the path, time and size of every definition, and on the version of
lm-eval, so that a changed definition, or another lm-eval, is read anew.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, NamedTuple

import lm_eval.tasks
import lm_eval.utils
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.tasks import TaskManager, manager
from lm_eval.tasks._index import Entry, Kind

from lolcats.errors import LolcatsError
from lolcats.files import cache_root, write_bytes


class Source(NamedTuple):
    """A data set of the hub."""

    path: str | None
    name: str | None
    """The part of it, such as a subject of MMLU."""


class Catalog:
    """lm-eval's index of tasks, groups and tags.

    Args:
        manager: lm-eval's own index.
    """

    def __init__(self, manager: TaskManager) -> None:
        self.manager = manager
        self._children: dict[str, list[str]] = {}
        self._parents: dict[str, list[str]] = defaultdict(list)
        for name, entry in sorted(manager.task_index.items()):
            listed = (entry.cfg or {}).get("task")
            members = sorted(entry.tags) if entry.cfg is None else list(_names(listed))
            if members:
                self._children[name] = members
            for member in members:
                self._parents[member].append(name)

    def check(self, names: Iterable[str]) -> None:
        """Raise LolcatsError if one of `names` is neither a task, group or tag of lm-eval nor a YAML file of a task."""
        known = self.manager.all_tasks
        for name in names:
            if name in self.manager.task_index or self.is_file(name):
                continue
            if name.endswith((".yaml", ".yml")):
                raise LolcatsError(f"no file {name}; expected a task of lm-eval, or a file .yaml that defines one")
            near = difflib.get_close_matches(name, known, 3) or [task for task in known if name.lower() in task][:3]
            hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists them all"
            raise LolcatsError(f"unknown task {name!r}: lm-eval has no task or group of that name; {hint}")

    def is_file(self, name: str) -> bool:
        """Whether a name is not lm-eval's but that of a file that defines a task."""
        return name not in self.manager.task_index and name.endswith(".yaml") and Path(name).is_file()

    def lineage(self, task: str) -> list[str]:
        """The groups and tags that contain a task, nearest first."""
        found: list[str] = []
        level = [task, *task.split("::")[:1]]  # a task written inside a group is called group::task
        while level:
            level = [parent for name in level for parent in self._parents.get(name, []) if parent not in found]
            found += dict.fromkeys(level)
        return found

    def leaves(self, name: str) -> list[str]:
        """The tasks below a group or tag; of a task, itself."""
        if name not in self._children:
            return [name]
        return [leaf for child in self._children[name] for leaf in self.leaves(child)]

    def source(self, task: str) -> Source:
        """Where lm-eval gets a task's data."""
        entry = self.manager.task_index.get(task)
        settings = {} if entry is None or entry.cfg is None else entry.cfg
        return Source(settings.get("dataset_path"), settings.get("dataset_name"))

    def name_of(self, task: Any) -> str:
        """The name of a task that is being built; those written as Python classes learn theirs only afterwards."""
        if name := getattr(task.config, "task", None):
            return name
        kind = f"{type(task).__module__}.{type(task).__qualname__}"
        for name, entry in self.manager.task_index.items():
            if str((entry.cfg or {}).get("class", "")).replace("/", ".").endswith(kind):
                return name
        return type(task).__name__


@cache
def catalog() -> Catalog:
    """The one of the installed lm-eval, read once."""
    _sandbox_templates()
    return Catalog(task_manager())


def _sandbox_templates() -> None:
    """Let lm-eval fill in its templates, which may be a stranger's, in a sandbox: theirs could run any code."""
    own = lm_eval.utils.env
    sandbox = SandboxedEnvironment(
        loader=own.loader, undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
    )
    sandbox.filters |= own.filters
    lm_eval.utils.env = sandbox


def _names(members: object) -> Iterator[str]:
    for member in members if isinstance(members, list) else []:
        if isinstance(member, str):
            yield member
        elif isinstance(member.get("task"), list):  # a group written inside a group
            yield from _names(member["task"])
        elif name := member.get("group") or member.get("task"):
            yield name


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
