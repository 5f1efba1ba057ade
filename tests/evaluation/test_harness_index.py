"""lm-eval's index from the cache is the one that lm-eval makes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from lolcats.evaluation.harness import catalog as index


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of definitions in the place of lm-eval's own, and an empty cache."""
    folder = tmp_path / "tasks"
    (folder / "one").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "one" / "one.yaml").write_text("task: one\ndataset_path: somewhere\n")
    monkeypatch.setattr(index.lm_eval.tasks, "__file__", str(folder / "__init__.py"))
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path / "cache"))
    return folder


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "lm-eval").iterdir())


def test_the_second_time_nothing_is_read(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = index.task_manager()
    assert first.all_tasks == ["one"] and len(cached(tmp_path)) == 1

    def read(*args: object, **options: object) -> dict[str, object]:
        raise AssertionError("the definitions were read again")

    monkeypatch.setattr("lm_eval.tasks._index.load_yaml", read)
    again = index.task_manager()
    assert isinstance(again, TaskManager) and again.task_index == first.task_index


@pytest.mark.slow
def test_everything_of_lm_eval_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a real installation; nothing is unpickled."""
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path / "cache"))
    made = index.task_manager()
    assert [path.suffix for path in cached(tmp_path)] == [".json"]
    found = index.task_manager()
    assert found.task_index == made.task_index and found.all_groups == made.all_groups
    assert found.all_subtasks == made.all_subtasks and found.all_tags == made.all_tags


def test_changed_definitions_are_read(tasks: Path, tmp_path: Path) -> None:
    index.task_manager()
    before = cached(tmp_path)
    (tasks / "two.yaml").write_text("task: two\ndataset_path: somewhere\n")
    assert index.task_manager().all_tasks == ["one", "two"]
    os.utime(tasks / "two.yaml", ns=(1, 1))
    index.task_manager()
    assert len(cached(tmp_path)) == 1 and cached(tmp_path) != before


@pytest.mark.parametrize(
    "content",
    [b"", b"no JSON", b"\x80\x04N.", b"{}1", b"[[1]]", b'{"one/one.yaml": "task: one"}', b"[" * 100_000],
    ids=lambda content: str(content[:30]),
)  # fmt: skip
def test_a_broken_cache_is_made_anew(tasks: Path, tmp_path: Path, content: bytes) -> None:
    index.task_manager()
    (file,) = cached(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(content)
    assert index.task_manager().all_tasks == ["one"] and file.read_bytes() == whole


def test_other_files_that_a_cache_names_are_no_definitions(tasks: Path, tmp_path: Path) -> None:
    """Code that they name would be run."""
    index.task_manager()
    (file,) = cached(tmp_path)
    (tmp_path / "two.yaml").write_text("task: two\nclass: !function two.Task\n")
    file.write_text('{"../two.yaml": {"task": "two", "class": "two.Task"}}')
    assert index.task_manager().all_tasks == ["one"]


def test_a_cache_that_cannot_be_written(tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert index.task_manager().all_tasks == ["one"]
