"""Tasks of lm-eval from local files: which file, which rows, and one line on what is wrong."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from lolcats.errors import DataError, LolcatsError
from lolcats.evaluation.harness.catalog import catalog
from lolcats.evaluation.harness.files import TaskFiles
from lolcats.evaluation.harness.run import HarnessSettings, load_benchmarks
from lolcats.evaluation.harness.tasks import Benchmark
from lolcats.silence import quiet

from .conftest import DATA


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """One file."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(folder: Path, *tasks: str, **settings: Any) -> list[Benchmark]:
    """The tasks, with their data."""
    with quiet():
        return load_benchmarks(tasks, HarnessSettings(task_data=folder, **settings))


def test_unknown_tasks_have_near_names() -> None:
    """Misspelt, a part of a name, or nothing like any."""
    for name, near in ("hellaswagg", "hellaswag"), ("boolq_x", "boolq"), ("zzzzqqq", "lm-eval ls tasks"):
        with pytest.raises(LolcatsError, match=f"unknown task {name!r}.*{near}"):
            catalog().check(["piqa", name])


def test_lineage_of_a_task() -> None:
    """The nearest group first; a group's leaves are its tasks."""
    lineage = catalog().lineage("mmlu_anatomy")
    assert lineage[0] == "mmlu_stem_tasks" and lineage.index("mmlu_stem") < lineage.index("mmlu")
    assert "mmlu_anatomy" in catalog().leaves("mmlu") and catalog().leaves("piqa") == ["piqa"]
    assert catalog().source("mmlu_anatomy") == ("cais/mmlu", "anatomy")


def test_a_group_without_a_sum_has_a_row_for_each_task(tmp_path: Path) -> None:
    """A tag too; each task takes its own file, compressed or not."""
    rows = [DATA["arc_challenge_test"](seed) for seed in range(3)]
    write(tmp_path, "arc_challenge_test", rows)
    with gzip.open(tmp_path / "arc_easy_test.jsonl.gz", "wt") as file:
        file.write("\ufeff" + "\n\n".join(json.dumps(row) for row in rows[:2]) + "\n")
    (benchmark,) = load(tmp_path, "ai2_arc")
    assert benchmark.rows == ["arc_challenge", "arc_easy"]
    assert [len(task.eval_docs) for task in benchmark.tasks.values()] == [3, 2]


def test_rows_of_a_group_are_told_apart_by_their_subject(tmp_path: Path) -> None:
    """However its name is spelt; a file of the task itself comes first; a group of one data set is left whole."""
    rows = [{"problem": f"p{i}", "solution": "s", "type": t} for i, t in enumerate(["Algebra", "Number Theory"] * 2)]
    write(tmp_path, "hendrycks_math_test", rows)
    files = TaskFiles(tmp_path, catalog())

    def problems(task: str) -> list[str]:
        return [row["problem"] for row in files.read(task, catalog().source(task), "test")[1]]

    assert problems("hendrycks_math_num_theory") == ["p1", "p3"]
    write(tmp_path, "hendrycks_math_num_theory_test", rows[:1])
    assert problems("hendrycks_math_num_theory") == ["p0"]
    with pytest.raises(DataError, match=r"hendrycks_math_test\.jsonl: no field, such as subject, says 'geometry'"):
        problems("hendrycks_math_geometry")
    write(tmp_path, "mmlu_pro_test", [{"question": "q", "category": "law"}, {"question": "q", "category": "math"}])
    assert len(files.read("mmlu_pro_law", catalog().source("mmlu_pro_law"), "test")[1]) == 2


def test_missing_files_are_named(tmp_path: Path) -> None:
    """The split that is measured, what is there instead, and the folder."""
    row = DATA["arc_challenge_test"](0)
    write(tmp_path, "openbookqa_validation", [{**row, "question_stem": "q"}])
    with pytest.raises(DataError, match=r"openbookqa: no file openbookqa_test\.jsonl\[\.gz\] in .* \(openbookqa_"):
        load(tmp_path, "openbookqa")
    with pytest.raises(DataError, match=r"no file mmlu_anatomy_test\.jsonl\[\.gz\] or mmlu_test\.jsonl\[\.gz\] in "):
        load(tmp_path, "mmlu_anatomy")
    with pytest.raises(DataError, match=r"no folder .*/gone"):
        load(tmp_path / "gone", "piqa")


def test_examples_need_their_split(tmp_path: Path) -> None:
    """gsm8k asks for five of its training split; without them its test split is enough."""
    write(tmp_path, "gsm8k_test", [DATA["gsm8k_test"](s) for s in range(3)])
    with pytest.raises(DataError, match=r"gsm8k_train\.jsonl.*5 examples .* 0 examples need none"):
        load(tmp_path, "gsm8k")
    assert len(load(tmp_path, "gsm8k", examples={"gsm8k": 0})[0].tasks["gsm8k"].eval_docs) == 3
    with pytest.raises(LolcatsError, match="names boolq, which is not among the tasks"):
        load(tmp_path, "gsm8k", examples={"gsm8k": 0, "boolq": 2})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"goal": "a"}\n{"goal": \n', r"piqa_validation\.jsonl:2: broken JSON"),
        (b'{"goal": "a"}\n[1]\n', r"piqa_validation\.jsonl:2: expected a JSON object, got '\[1\]'"),
        (b'{"goal": "\xff"}\n', r"piqa_validation\.jsonl is not UTF-8"),
        (b"\n", r"piqa_validation\.jsonl is empty"),
        (b'{"goal": "a"}\n{"goal": 1}\n', r"piqa_validation\.jsonl: each field must have values of one type"),
        (
            b'{"goal": "a", "label": 0}\n',
            r"piqa cannot be made from piqa_validation\.jsonl with its fields goal, label: ",
        ),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, message: str) -> None:
    """The file, and the line where there is one."""
    (tmp_path / "piqa_validation.jsonl").write_bytes(content)
    with pytest.raises(LolcatsError, match=message):
        load(tmp_path, "piqa")


def test_a_task_that_runs_code_is_refused(tmp_path: Path) -> None:
    """Programs written by a model are not run."""
    write(tmp_path, "humaneval_test", [{"prompt": "p", "test": "t", "entry_point": "f", "canonical_solution": "c"}])
    with pytest.raises(LolcatsError, match="humaneval"):
        load(tmp_path, "humaneval")
