"""Tasks as they are run: loaded by lm-eval, with their data and their number of examples in the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task

from lolcats.errors import LolcatsError
from lolcats.evaluation.harness.catalog import Catalog
from lolcats.evaluation.harness.files import LocalSplits, TaskFiles
from lolcats.evaluation.harness.own_tasks import check_file
from lolcats.identity import digest

PAPER_EXAMPLES = {"mmlu": 5}
"""Examples in the prompt where neither the user nor lm-eval says how many."""
ALL = "*"
"""Key of the number of examples that holds for every task."""


@dataclass
class Benchmark:
    """A task or group that was asked for by name."""

    name: str
    tasks: dict[str, Task]
    """What is measured, by name: of a group such as mmlu, its parts."""
    groups: dict[str, Group]
    digest: str
    """A hash of the data and of the number of examples."""

    @property
    def rows(self) -> list[str]:
        """Names of the results to show: a group that sums up its parts is one."""
        if self.name in self.groups:
            return list(dict.fromkeys(_rows(self.groups[self.name])))
        return list(self.tasks)

    def parts(self, row: str) -> list[str]:
        """The tasks that a row sums up; of a task, itself."""
        return [task.task_name for task in self.groups[row].get_all_tasks()] if row in self.groups else [row]

    def seed(self, seed: int) -> None:
        """Set the seed by which examples are drawn."""
        for task in self.tasks.values():
            task.set_fewshot_seed(seed)


def load_benchmark(
    name: str, catalog: Catalog, files: TaskFiles | None, examples: Mapping[str, int], code: bool
) -> Benchmark:
    """Let lm-eval build a task or group.

    Args:
        name: one that the catalog knows.
        catalog: which there are.
        files: local data; None lets lm-eval fetch them from the hub.
        examples: examples in the prompt, by the name of a task or group; `ALL` stands for any.
        code: whether code that a YAML file names may be run.

    Raises:
        LolcatsError: its data cannot be had, or it needs something that is not here.
    """
    if catalog.is_file(name):
        check_file(Path(name), code=code)
    with _data_from(files) as problems:
        try:
            loaded = catalog.manager.load([name])
        except LolcatsError:
            raise
        except Exception as error:  # from anywhere in datasets, lm-eval, or the code that defines the task
            text = _explain(name, catalog, files, error, of_data=error in problems)
            raise LolcatsError(text, hint="task_data" if "local files can be read" in text else None) from error
    facts: dict[str, Any] = {}
    for task_name, task in loaded["tasks"].items():
        _refuse_unsafe(task_name, task)
        count = _examples(task_name, task, catalog, examples)
        if isinstance(task.dataset, LocalSplits):
            task.dataset.check(count)
        task.set_config("num_fewshot", count)
        facts[task_name] = [_data_digests(task), count]
    return Benchmark(name, loaded["tasks"], loaded.get("groups", {}), digest(facts))


def _examples(name: str, task: Task, catalog: Catalog, wanted: Mapping[str, int]) -> int:
    for level in (wanted, PAPER_EXAMPLES):
        for key in (name, *catalog.lineage(name), ALL):
            if key in level:
                return level[key]
    return task.config.num_fewshot or 0


def _rows(group: Group) -> list[str]:
    if group.has_aggregation:
        return [group.name]
    return [row for child in group for row in (_rows(child) if isinstance(child, Group) else [child.task_name])]


def _refuse_unsafe(name: str, task: Task) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise LolcatsError(f"{name} runs code that the model writes, which is not done here; use lm-eval itself")
    if getattr(task, "MULTIMODAL", False):
        raise LolcatsError(f"{name} is about images or sound; expected a task of text")


def _data_digests(task: Task) -> dict[str, str]:
    data: Any = task.dataset
    if isinstance(data, LocalSplits):
        return dict(sorted(data.digests.items()))
    try:
        return {split: str(part._fingerprint) for split, part in sorted(data.items())}
    except AttributeError:  # made by the task itself
        return {}


@contextmanager
def _data_from(files: TaskFiles | None) -> Iterator[list[Exception]]:
    """Inside, a task that is built takes its data from files, or the hub; gives what went wrong at the hub."""
    original = ConfigurableTask.download
    problems: list[Exception] = []

    def download(task: ConfigurableTask, *args: Any, **options: Any) -> None:
        if files is not None:
            task.dataset = LocalSplits(files, task)
            return
        try:
            original(task, *args, **options)
        except Exception as error:
            problems.append(error)
            raise

    ConfigurableTask.download = download  # type: ignore[method-assign]
    try:
        yield problems
    finally:
        ConfigurableTask.download = original  # type: ignore[method-assign]


def _explain(name: str, catalog: Catalog, files: TaskFiles | None, error: Exception, *, of_data: bool) -> str:
    """One line on why a task cannot be built.

    Args:
        of_data: whether it went wrong while the task got its data from the hub.
    """
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    reason = f"{type(error).__name__}: {said}"
    if isinstance(error, ModuleNotFoundError):
        return f"{name} needs the package {error.name}, which is not installed: pip install {error.name}"
    if files is not None and files.last is not None:
        fields = ", ".join(files.last.rows[0])
        return (
            f"{name} cannot be made from {files.last.path.name} with its fields {fields}: {reason}; expected the "
            "fields of its data set on the hub"
        )
    if catalog.is_file(name) and not of_data:
        return f"{name} does not define a task that its data fit: {reason}"
    if catalog.is_file(name):
        return f"the data that {name} names in dataset_path cannot be had: {reason}; local files can be read instead"
    path, part = catalog.source(catalog.leaves(name)[0])
    hub = f"{path} ({part})" if part else path
    return f"the data of {name}, {hub} on the hub, cannot be had: {reason}; local files can be read instead"
