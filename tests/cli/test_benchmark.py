"""`lolcats benchmark`: the table, the file of numbers, refusals, and what a killed process leaves behind."""

import importlib.metadata
import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import forked
import lolcats
from tiny import SENTENCE

from .conftest import Run

OF_TEACHER = ["teacher", "training_free", "equal_window", "trained_window"]
VARIANTS = [*OF_TEACHER, "student", "window_only", "linear_only", "no_attention"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions of piqa and of winogrande."""
    folder = tmp_path_factory.mktemp("data")
    words = SENTENCE.split()
    with (folder / "piqa_validation.jsonl").open("w") as file:
        for i in range(60):
            goal, first, second = (" ".join(words[(i * k) % 15 : (i * k) % 15 + 4]) for k in (1, 2, 3))
            file.write(json.dumps({"goal": goal, "sol1": first, "sol2": second + "s", "label": i % 2}) + "\n")
    with (folder / "winogrande_validation.jsonl").open("w") as file:
        for i in range(8):
            row = {"sentence": f"the {words[i]} saw _ there", "option1": "cat", "option2": "moon", "answer": "1"}
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def _without(version: Callable[[str], str], missing: str, name: str) -> str:
    if name == missing:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)


@pytest.mark.slow
def test_a_table_of_tasks_and_variants(cli: Run, data: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All controls beside the student; the paper's metric in the table, all of lm-eval's in the file."""
    # As where the package is used from its sources: without metadata.
    metadata = partial(_without, importlib.metadata.version, "lolcats")
    monkeypatch.setattr(importlib.metadata, "version", metadata)
    words = ["piqa,winogrande", "--task-data", data, "--limit", 5, "--seeds", "0,1", "--json", "x.json"]
    answer = cli("benchmark", finished, *words, "--chat")
    assert answer.code == 0 and answer.err == ""
    for part in ("piqa", "winogrande", "average", "linear", "attention", "over 2 seeds", "--limit 5: piqa 5 questions"):
        assert part in answer.out, answer.out
    content = json.loads(Path("x.json").read_text())
    assert [row["task"] for row in content["rows"]] == ["piqa", "winogrande"]
    assert list(content["rows"][0]["scores"]) == list(content["results"]) == VARIANTS
    assert set(content["results"]["student"]["1"]["piqa"]) >= {"acc,none", "acc_norm,none", "acc_stderr,none"}
    assert content["settings"]["chat"] is True and content["versions"]["lm_eval"]
    assert content["versions"]["lolcats"] == lolcats.__version__
    assert "KV tokens of the teacher" in answer.out and content["memory"]["bytes"] > 0
    assert content["dtype"] == "float32" and content["device"].startswith("cpu")
    assert not Path("x.json.progress").exists()


def test_a_model_alone(cli: Run, data: Path, place: Path, cache: Path) -> None:
    """Any model is its own teacher; nothing is left behind but the table."""
    answer = cli("benchmark", place / "teacher", "piqa", "--task-data", data, "--limit", 4, "--batch-size", 3)
    assert answer.code == 0 and "standard error" in answer.out and "average" not in answer.out
    assert list(Path().iterdir()) == [] and not list(cache.rglob("*.progress"))


def test_what_cannot_be_run_is_said_in_a_line(cli: Run, data: Path, place: Path) -> None:
    """Names, numbers, and options of the other measurement."""
    teacher = place / "teacher"
    cli("benchmark", teacher, "piqaa").refused("unknown task 'piqaa'", "did you mean piqa")
    cli("benchmark", teacher, "boolq", "--task-data", data).refused("boolq_validation.jsonl[.gz]", str(data))
    cli("benchmark", teacher, "piqa", "--length", 9).refused("--length")
    cli("evaluate", teacher, "--tasks", "piqa").refused("--tasks is a verb of its own", "lolcats benchmark MODEL TASK")
    cli("evaluate", teacher, "--recall", "vt").refused("--recall is a verb of its own", "lolcats recall MODEL TASK")
    cli("benchmark", teacher, "piqa", "--seeds", "1,one").refused("'one' is no whole number")
    cli("benchmark", teacher, "piqa", "--seeds", "1,1").refused("different seeds")
    cli("benchmark", teacher, "piqa", "--num-fewshot", "piqa=x").refused("--num-fewshot", "'x'")
    cli("benchmark", teacher, " , ").refused("no task")


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(
    cli: Run, data: Path, finished: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Killed, started again, interrupted, started again: the numbers of one that was left alone."""
    words = [str(finished), "piqa", "--task-data", str(data), "--json"]
    command = ["-m", "lolcats.cli", "benchmark", *words, "x.json"]
    progress = tmp_path / "x.json.progress"

    def answers() -> int:
        if not progress.exists():
            return 0
        with sqlite3.connect(progress) as database:
            tables = database.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
            return database.execute("SELECT COUNT(*) FROM answers").fetchone()[0] if tables else 0

    def stop(how: signal.Signals, after: int) -> tuple[int, str, str]:
        for name in ("out", "err"):
            (tmp_path / name).unlink(missing_ok=True)
        process = forked.start(command, tmp_path, environment, error="err")
        deadline = time.monotonic() + 200
        while process.is_alive() and time.monotonic() < deadline and answers() < after:
            time.sleep(0.02)
        assert process.pid is not None
        os.kill(process.pid, how)
        process.join(200)
        return process.exitcode or 0, (tmp_path / "out").read_text(), (tmp_path / "err").read_text()

    assert stop(signal.SIGKILL, 2)[0] == -signal.SIGKILL
    seen = answers()
    assert seen >= 2 and not (tmp_path / "x.json").exists()
    code, out, err = stop(signal.SIGINT, seen + 2)
    assert code == 130 and "going on with an evaluation that was interrupted" in out
    assert err.splitlines()[-1].endswith("the same command goes on from there") and "Traceback" not in err
    assert answers() > seen and not (tmp_path / "x.json").exists()
    assert cli("benchmark", *words, "x.json").code == cli("benchmark", *words, "y.json").code == 0
    first, second = (json.loads(Path(name).read_text()) | {"date": ""} for name in ("x.json", "y.json"))
    assert first == second
    assert not progress.exists()
