"""Tasks in a user's own YAML: the true reason where one cannot be used, and no code of theirs unless asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lolcats.config.strict_yaml import write_yaml
from lolcats.errors import LolcatsError
from lolcats.evaluation import Variant
from lolcats.evaluation.harness import HarnessSettings
from lolcats.evaluation.harness.run import load_benchmarks, measure_benchmarks
from lolcats.evaluation.store import AnswerStore, default_file
from lolcats.silence import quiet

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def definition(tmp_path: Path) -> dict[str, Any]:
    """A task that works, with its data."""
    rows = [{"text": f"the river turns {i}", "choices": ["mill", "stone"], "label": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "rivers", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "output_type": "multiple_choice", "test_split": "train", "doc_to_text": "{{text}}", "doc_to_choice": "choices",
        "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Write a definition to own.yaml, and load it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", tmp_path / "hf")

    def load(content: dict[str, Any] | str, **settings: Any) -> Any:
        text = content if isinstance(content, str) else write_yaml(content)
        (tmp_path / "own.yaml").write_text(text)
        with quiet():
            return load_benchmarks([str(tmp_path / "own.yaml")], HarnessSettings(**settings))

    return load


@pytest.mark.slow
def test_a_task_of_ones_own_is_measured(
    load: Callable[..., Any],
    definition: dict[str, Any],
    model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    loaded = load(definition)
    with quiet():
        scores = measure_benchmarks({"teacher": Variant(model)}, tiny_tokenizer, loaded, HarnessSettings())
    assert [(row.task, row.questions) for row in scores.rows] == [("rivers", 4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": None}, r"own.yaml: expected `task: NAME`"),
        ({"task": "\x1b[31mred"}, r"own.yaml: expected `task: NAME`.*x1b"),
        ({"dock_to_text": "x"}, r"own.yaml: unknown key 'dock_to_text'; did you mean doc_to_text\?"),
        ({"metric_list": [{"metric": "acck"}]}, r"own.yaml: 'acck' is no metric of lm-eval.*did you mean acc\?"),
        (
            {"metric_list": [{"metric": "acc", "hf_evaluate": True}]},
            r"one of the hub is code \(allow that",
        ),
        ({"metric_list": ["acc"]}, r"expected metric_list as a list"),
        ({"dataset_path": None}, r"own.yaml: expected dataset_path"),
        ({"test_split": None}, r"own.yaml: expected test_split or validation_split"),
        ({"doc_to_text": "{{question}}"}, r"own.yaml does not define a task that its data fit.*question"),
        ({"dataset_kwargs": {"data_files": "/nowhere.jsonl"}}, r"that .*own.yaml names in dataset_path cannot be had"),
        ({"include": "gone.yaml"}, r"cannot read .*gone.yaml"),
        ({"include": "own.yaml"}, r"own.yaml includes itself"),
        ({"doc_to_text": "{{ ''.__class__.__mro__ }}"}, r"own.yaml does not define .*Security"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_true_reason(
    load: Callable[..., Any], definition: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(LolcatsError, match=message) as caught:
        load({key: value for key, value in (definition | change).items() if value is not None})
    assert "None" not in str(caught.value).replace("got None", "") and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("text", ["- 1\n", "a: [\n", "a: !!python/object/apply:os.system [x]\n", "", "\0"])
def test_what_is_no_definition(load: Callable[..., Any], text: str) -> None:
    with pytest.raises(LolcatsError, match=r"cannot read .*own.yaml|own.yaml: expected"):
        load(text)


def test_code_runs_only_when_asked(load: Callable[..., Any], definition: dict[str, Any], tmp_path: Path) -> None:
    """Named by the file itself, or by one that it includes."""
    (tmp_path / "helpers.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef ask(doc):\n    return doc['text']\n"
    )
    del definition["doc_to_text"]
    code = write_yaml(definition) + "doc_to_text: !function helpers.ask\n"
    (tmp_path / "included.yaml").write_text(code)
    for text in (code, "include: included.yaml\ntask: other\n", "task: x\nclass: !function helpers.ask\n"):
        with pytest.raises(LolcatsError, match=r"names Python code \(.*which is not run; allow that if you trust it"):
            load(text)
    assert not (tmp_path / "ran").exists()
    assert load(code, code=True)[0].rows == ["rivers"]
    assert (tmp_path / "ran").exists()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LolcatsError, match=r"no file .*mine.yaml; expected"):
        load_benchmarks([str(tmp_path / "mine.yaml")], HarnessSettings())


def test_progress_is_kept_in_the_cache_that_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOLCATS_CACHE", str(tmp_path / "mine"))
    assert default_file("a").is_relative_to(tmp_path / "mine") and default_file("a") != default_file("b")
    monkeypatch.setenv("LOLCATS_CACHE", "~/mine")
    assert default_file("a").is_relative_to(Path.home() / "mine")


def test_damaged_progress_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.progress"
    progress = AnswerStore(file)
    for number in range(400):
        progress.put(f"key{number}", "a" * 100)
    progress._database.execute("INSERT INTO answers VALUES ('odd', '{')")
    progress._database.commit()
    with pytest.raises(LolcatsError, match=r"x.progress is damaged .*delete it: what it held is done anew"):
        progress.get("odd")
    progress._database.close()
    content = bytearray(file.read_bytes())
    content[4096:] = bytes(len(content) - 4096)
    file.write_bytes(content)
    with pytest.raises(LolcatsError, match=r"x.progress (is damaged|cannot hold).*(delete it|move it away)"):
        AnswerStore(file).get("key7")
