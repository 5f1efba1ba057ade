"""Tasks that a user defines in YAML files of lm-eval's form, looked at before lm-eval builds them.

lm-eval runs code that such a file names: Python functions (`!function`), classes, and metrics that it fetches from the
hub. A file is data until somebody says that it may do so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.registry import metric_registry
from lm_eval.config.group import GroupConfig
from lm_eval.config.task import TaskConfig

from lolcats.errors import LolcatsError, did_you_mean

STRUCTURE = {"include", "class", "task_list", "group"}
"""Keys that lm-eval reads before it makes a task."""
TASK_KEYS = {field.name for field in fields(TaskConfig)} | STRUCTURE
GROUP_KEYS = {field.name for field in fields(GroupConfig)} | TASK_KEYS
ASK = "allow that if you trust it"


def check_file(path: Path, *, code: bool = False) -> None:
    """Refuse a definition that lm-eval could not use, or that would run code.

    Args:
        path: the YAML file.
        code: whether code that it names may be run.

    Raises:
        LolcatsError: what is wrong, where, and what was expected.
    """
    functions: list[str] = []
    content = _read(path, functions, [])
    named = "class" if "class" in content else "!function" if functions else ""
    if named and not code:
        raise LolcatsError(
            f"{path} names Python code ({named} {(functions or [''])[0]}), which is not run; {ASK}", hint="task_code"
        )
    name = content.get("group") or content.get("task")
    if not isinstance(name, str) or not name.isprintable():
        raise LolcatsError(f"{path}: expected `task: NAME`, the name of the task; got {name!r:.60}")
    known = GROUP_KEYS if "group" in content else TASK_KEYS
    for key in content:
        if key not in known:
            hint = did_you_mean(key, known, f"expected some of {', '.join(sorted(TASK_KEYS))}")
            raise LolcatsError(f"{path}: unknown key {key!r}; {hint}")
    _check_metrics(path, content, code)
    if "group" not in content and "class" not in content:
        _check_data(path, content)


def _check_data(path: Path, content: dict[str, Any]) -> None:
    if not (content.get("test_split") or content.get("validation_split")):
        raise LolcatsError(f"{path}: expected test_split or validation_split, the part of the data that is measured")
    if not (content.get("dataset_path") or content.get("custom_dataset")):
        raise LolcatsError(f"{path}: expected dataset_path, the name of a data set on the hub, or json and the like")


def _check_metrics(path: Path, content: dict[str, Any], code: bool) -> None:
    """Those of a task, or of all tasks that are written inside a group."""
    listed = content.get("metric_list") or []
    if not isinstance(listed, list) or not all(isinstance(entry, dict) and "metric" in entry for entry in listed):
        raise LolcatsError(f"{path}: expected metric_list as a list of entries such as `- metric: acc`")
    for entry in () if code else listed:
        metric = str(entry["metric"])
        if entry.get("hf_evaluate") or metric not in metric_registry:
            near = did_you_mean(metric, metric_registry, f"lm-eval's own are {', '.join(sorted(metric_registry))}")
            raise LolcatsError(
                f"{path}: {metric!r} is no metric of lm-eval, and one of the hub is code ({ASK}); {near}",
                hint="task_code",
            )
    members = content.get("task")
    for member in members if isinstance(members, list) else []:
        if isinstance(member, dict):
            _check_metrics(path, member, code)


def _read(path: Path, functions: list[str], parents: list[Path]) -> dict[str, Any]:
    """The definition with what it includes; names of functions go to `functions`."""
    if path.resolve() in parents:
        raise LolcatsError(f"{path} includes itself")

    class Loader(yaml.SafeLoader):
        pass

    def note(loader: yaml.Loader, node: yaml.Node) -> str:
        functions.append(str(node.value))
        return f"!function {node.value}"

    Loader.add_constructor("!function", note)
    try:
        content = yaml.load(path.read_bytes(), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise LolcatsError(f"cannot read {path}: {said}") from error
    if not isinstance(content, dict):
        raise LolcatsError(f"{path}: expected `key: value` lines that define a task; got {content!r:.60}")
    merged: dict[str, Any] = {}
    for included in _names(content.get("include"), path):
        merged |= _read(path.parent / included, functions, [*parents, path.resolve()])
    return merged | content


def _names(include: object, path: Path) -> Iterator[str]:
    for name in include if isinstance(include, list) else [] if include is None else [include]:
        if not isinstance(name, str):
            raise LolcatsError(f"{path}: expected include: FILE.yaml; got {name!r:.60}")
        yield name
