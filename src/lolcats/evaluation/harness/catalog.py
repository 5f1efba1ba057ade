"""The tasks that lm-eval knows: which names exist, what contains what, and where each task's data come from.

What their definitions say is kept on disk, because there are some ten thousand small files of them:
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
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval.tasks
import lm_eval.utils
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.tasks import TaskManager, _index

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
    """lm-eval's own, its definitions from the cache. One that cannot be read or written does not matter."""
    root = Path(lm_eval.tasks.__file__).parent
    file = cache_root() / "lm-eval" / f"{_stamp(root)}.json"
    known, found = _read(file), {}
    original = _index.load_yaml

    def load(path: Path, **options: Any) -> dict[str, Any]:
        name = path.relative_to(root).as_posix()
        found[name] = known[name] if name in known else original(path, **options)
        return found[name]

    _index.load_yaml = load
    try:
        manager = TaskManager()
    finally:
        _index.load_yaml = original
    if not known:
        _keep(file, found)
    return manager


def _stamp(root: Path) -> str:
    digest = hashlib.sha256(f"{importlib.metadata.version('lm_eval')} json 2".encode())
    for folder, folders, names in os.walk(root):
        folders.sort()
        for path in (os.path.join(folder, name) for name in sorted(names) if name.endswith(".yaml")):
            status = os.stat(path)
            digest.update(f"{path} {status.st_mtime_ns} {status.st_size}\n".encode())
    return digest.hexdigest()[:20]


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Path of a definition -> what it says; empty where that is not what the file holds."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    is_whole = isinstance(content, dict) and all(isinstance(settings, dict) for settings in content.values())
    return content if is_whole else {}


def _keep(file: Path, found: dict[str, dict[str, Any]]) -> None:
    """Write the file in place of that of another stamp, with what JSON gives back as it was."""
    try:
        content = {name: settings for name, settings in found.items() if json.loads(json.dumps(settings)) == settings}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, json.dumps(content).encode())
        for old in [*file.parent.glob("*.json"), *file.parent.glob("*.pickle")]:  # pickle: of version 0.1.0
            if old != file:
                old.unlink(missing_ok=True)
    except (LolcatsError, OSError, ValueError, TypeError):
        return
