"""Benchmarks and recall as a part of a sweep: the numbers, what is measured again, and what is refused beforehand."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lolcats import LolcatsError
from lolcats.evaluation import harness
from lolcats.evaluation.compare import load_variants
from lolcats.evaluation.recall import RecallSettings, recall
from lolcats.runs.folder import RunFolder
from lolcats.sweep import MEASUREMENTS, Sweep, SweepMeasurement, check_measure, make_plan, run_sweep
from lolcats.sweep import measure as measure_module
from lolcats.training import Reporter

RANKS = {"grid": {"finetune.rank": [2, 3]}}
LENGTHS = [600, 500]
SCORES = ["piqa.acc", "arc_challenge.acc_norm", "tasks.average", "passkey.500", "passkey.600"]

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval otherwise forks to draw its bootstrap samples."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


@pytest.fixture
def measure(task_data: Path) -> dict[str, Any]:
    """A section `measure` that takes a second."""
    tasks = {"tasks": ["piqa", "arc_challenge"], "task_data": str(task_data), "batch_size": 4}
    return tasks | {"recall": ["passkey"], "lengths": LENGTHS, "samples": 2}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured of which model, as it is measured."""
    made: list[str] = []
    original = measure_module.measure_model

    def noting(source: str, *args: Any, **kwargs: Any) -> None:
        say = kwargs.pop("say")

        def note(text: str) -> None:
            if text.startswith("measuring: "):
                made.append(text.removeprefix("measuring: "))
            say(text)

        original(source, *args, say=note, **kwargs)

    monkeypatch.setattr("lolcats.sweep.job.measure_model", noting)
    return made


def measured_file(sweep: Sweep, number: int = 0) -> Path:
    return RunFolder.of(sweep.runs[number].config).path / "measurements" / "measure.json"


@pytest.mark.slow
def test_numbers_are_those_of_evaluate(make_sweep: Callable[..., Sweep], measure: dict[str, Any]) -> None:
    """Of the saved student and of the teacher, in the table and in its files."""
    sweep = make_sweep(grid={"finetune.rank": [2]}, measure=measure)
    table = run_sweep(sweep, "study.yaml")
    assert [row.status for row in table.runs] == ["finished"] and table.columns()[-5:] == SCORES
    assert [row.name for row in table.teachers] == ["teacher"]
    how = harness.HarnessSettings(Path(measure["task_data"]), batch_size=4)
    models = {row.name: str(RunFolder.of(run.config).model) for row, run in zip(table.runs, sweep.runs, strict=True)}
    models["teacher"] = sweep.runs[0].config.model
    for row in [*table.runs, *table.teachers]:
        tasks = measure["tasks"]
        scores = harness.run_benchmarks(models[row.name], tasks, how, controls=(), device="cpu", dtype="float32")
        (variant,) = scores.rows[0].scores
        wanted = [row.scores[variant].mean for row in scores.rows] + [scores.averages()["average"][variant]]
        loaded = load_variants(models[row.name], controls=(), device="cpu", dtype="float32")
        cells = recall(loaded.variants, loaded.tokenizer, RecallSettings(["passkey"], LENGTHS, 2), batch_size=4)
        assert [row.columns[name] for name in SCORES] == wanted + [cell.score for cell in cells]
    assert "perplexity.student" not in table.teachers[0].columns
    with (sweep.folder / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == ["rank-2", "teacher"]
    assert float(lines[1]["tasks.average"]) == table.teachers[0].columns["tasks.average"]
    assert "| teacher | finished |" in (sweep.folder / "results.md").read_text()
    assert json.loads((sweep.folder / "results.json").read_text())["teachers"][0]["name"] == "teacher"


@pytest.mark.slow
def test_controls_are_measured_on_the_tasks(
    make_sweep: Callable[..., Sweep], finish: Callable[..., None], measure: dict[str, Any]
) -> None:
    """In columns of their own; recall and the teacher are as without them."""
    controls = ["window_only", "training_free"]
    sweep = make_sweep(grid={"seed": [0]}, measure=measure | {"controls": controls})
    finish(sweep)
    table = run_sweep(sweep, "study.yaml")
    config = sweep.runs[0].config
    how = harness.HarnessSettings(Path(measure["task_data"]), batch_size=4)
    scores = harness.run_benchmarks(
        RunFolder.of(config).model, measure["tasks"], how, teacher=config.model, controls=controls, device="cpu",
        dtype="float32",
    )  # fmt: skip
    columns = table.runs[0].columns
    for control in controls:
        assert columns[f"tasks.average.{control}"] == scores.averages()["average"][control]
        assert columns[f"piqa.acc.{control}"] == scores.rows[0].scores[control].mean
    assert columns["tasks.average"] == scores.averages()["average"]["student"]
    assert "tasks.average.teacher" not in columns and "passkey.500.window_only" not in columns
    assert set(table.teachers[0].columns) == set(SCORES)
    assert all(row.status == "finished" for row in run_sweep(sweep, "study.yaml").runs)


@pytest.mark.slow
def test_only_what_is_missing_is_measured(
    make_sweep: Callable[..., Sweep], finish: Callable[..., None], measure: dict[str, Any], asked: list[str]
) -> None:
    """More tasks and lengths, another limit, another number of samples, and a run that is new."""
    finish(make_sweep(**RANKS))

    def again(parts: dict[str, Any], **changes: Any) -> list[str]:
        asked.clear()
        table = run_sweep(make_sweep(**parts, measure=measure | changes), "study.yaml")
        assert {row.status for row in [*table.runs, *table.teachers]} == {"finished"}
        return [text for text in asked if text.split(", ")[1 if "tokens" not in text else 0] == "student"]

    first = {"grid": {"finetune.rank": [2]}}
    assert again(first, tasks=["piqa"], lengths=[500]) == ["piqa, student", "student, passkey, 500 tokens"]
    assert again(first, tasks=["piqa"], lengths=[500], batch_size=2) == [] and asked == []
    assert again(first, lengths=[500]) == ["arc_challenge, student"]
    assert asked == ["arc_challenge, teacher", "arc_challenge, student"]
    assert again(first, num_fewshot={"arc_challenge": 0}) == ["arc_challenge, student", *_recall([600])]
    assert again(first, num_fewshot={"arc_challenge": 0}, limit=5) == ["piqa, student", "arc_challenge, student"]
    assert again(first, limit=5, samples=1) == ["arc_challenge, student", *_recall(LENGTHS)]
    assert again(RANKS, limit=5, samples=1) == ["piqa, student", "arc_challenge, student", *_recall(LENGTHS)]
    assert not [text for text in asked if "teacher" in text]


def _recall(lengths: list[int]) -> list[str]:
    return [f"student, passkey, {length} tokens" for length in sorted(lengths)]


@pytest.mark.slow
def test_a_trained_run_is_only_measured(
    make_sweep: Callable[..., Sweep], measure: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted inside a task, which keeps its answers: no step is trained again."""
    sweep = make_sweep(**RANKS, measure=measure | {"recall": [], "teacher": False})
    with monkeypatch.context() as patch:
        patch.setattr("lolcats.evaluation.harness.model.PIECE", 1)
        patch.setattr(measure_module, "_measure_tasks", _interrupted(measure_module._measure_tasks))
        with pytest.raises(KeyboardInterrupt):
            run_sweep(sweep, "study.yaml")
        assert measured_file(sweep).with_name("measure.json.progress").exists()
        plan = make_plan(sweep)
        assert [run.status for run in plan.runs] == ["trained", "new"] and plan.runs[0].tokens["finetune"] == 0
    monkeypatch.setattr(Reporter, "step", None)  # would fail
    table = run_sweep(sweep, "study.yaml", only=["rank-2"])
    assert [row.status for row in table.runs] == ["finished", "new"] and table.teachers == []
    assert not measured_file(sweep).with_name("measure.json.progress").exists()
    assert table.runs[0].columns["tasks.average"] is not None


def _interrupted(original: Callable[..., None]) -> Callable[..., None]:
    def measure(*args: Any) -> None:
        def stop(label: str, done: int, count: int | None) -> None:
            if done >= 8:
                raise KeyboardInterrupt

        original(*args[:-1], stop)

    return measure


@pytest.mark.slow
def test_measuring_that_fails_is_noted(
    make_sweep: Callable[..., Sweep], finish: Callable[..., None], measure: dict[str, Any]
) -> None:
    """The numbers of the training are in the table nevertheless, and the next call tries again."""
    sweep = make_sweep(grid={"finetune.rank": [2]}, measure=measure | {"recall": []})
    finish(sweep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_module, "load_variants", _broken)
        table = run_sweep(sweep, "study.yaml")
    assert [(row.name, row.status) for row in [*table.runs, *table.teachers]] == [
        ("rank-2", "failed"), ("teacher", "failed")
    ]  # fmt: skip
    assert table.runs[0].error == "piqa: prompts too long"
    assert table.runs[0].columns["perplexity.student"]
    table = run_sweep(sweep, "study.yaml")
    assert {(row.status, row.error) for row in [*table.runs, *table.teachers]} == {("finished", "")}


def _broken(*args: Any, **kwargs: Any) -> Any:
    raise LolcatsError("piqa: prompts too long", hint="truncate")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ["piqqa"]}, r"unknown task 'piqqa'.*did you mean piqa"),
        ({"tasks": ["piqa", "winogrande"]}, r"winogrande: no file winogrande_validation\.jsonl\[\.gz\] in "),
        ({"task_data": "/nowhere"}, "no folder /nowhere; expected one with files such as"),
        ({"num_fewshot": {"mmlu": 5}}, r"number of examples names mmlu, which is not among the tasks"),
        ({"lengths": [512, 4096]}, r"measure\.lengths: a prompt of 4,096 tokens is longer than the model's context"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_found_before_anything_runs(
    make_sweep: Callable[..., Sweep], measure: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    sweep = make_sweep(**RANKS, measure=measure | changes)
    with pytest.raises(LolcatsError, match=said):
        check_measure(sweep, fetch=False)
    with pytest.raises(LolcatsError, match=said):
        run_sweep(sweep, "study.yaml")
    assert not sweep.folder.exists()


def test_without_lm_eval(
    make_sweep: Callable[..., Sweep], measure: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan needs it not; a run does."""
    sweep = make_sweep(**RANKS, measure=measure)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_measure(sweep, fetch=False)
    with pytest.raises(LolcatsError, match=r'pip install "lolcats\[eval\]"'):
        run_sweep(sweep, "study.yaml")


@pytest.mark.slow
def test_means_over_seeds_and_measurements_of_ones_own(
    make_sweep: Callable[..., Sweep], finish: Callable[..., None], measure: dict[str, Any]
) -> None:
    size = SweepMeasurement("size", lambda config, folder: {"size.seed": float(config.seed)})
    sweep = make_sweep(grid={"seed": [0, 1]}, measure=measure | {"tasks": []})
    finish(sweep)
    table = run_sweep(sweep, "study.yaml", measurements=[*MEASUREMENTS, size])
    assert table.columns()[-3:] == ["passkey.500", "passkey.600", "size.seed"]
    values = [row.columns["passkey.500"] for row in table.runs]
    assert table.means[0].columns["passkey.500"] == sum(value or 0.0 for value in values) / 2
    assert "teacher" in (sweep.folder / "means.csv").read_text()


@pytest.mark.usefixtures("forked_jobs")
@pytest.mark.parametrize(
    "names", [pytest.param("a", marks=pytest.mark.slow), pytest.param("ab", marks=pytest.mark.exhaustive)]
)
def test_side_by_side(
    make_sweep: Callable[..., Sweep],
    measure: dict[str, Any],
    model_folder: Path,
    names: str,
) -> None:
    """Each run and its teacher, measured in a process of its own: the numbers of one after the other."""
    teachers = {"a": str(model_folder), "b": f"{model_folder.parent}/./{model_folder.name}"}
    parts: dict[str, Any] = {"runs": [{"name": n, "model": teachers[n]} for n in names], "measure": measure}
    beside, after = make_sweep(name="beside", **parts), make_sweep(name="after", **parts)
    tables = [run_sweep(beside, "study.yaml", jobs=2), run_sweep(after, "study.yaml")]
    rows = [[*table.runs, *table.teachers] for table in tables]
    count = 2 * len(names)
    assert [row.status for row in rows[0]] == ["finished"] * count and len({row.name for row in rows[0]}) == count
    for name in SCORES:
        assert [row.columns[name] for row in rows[0]] == [row.columns[name] for row in rows[1]]
    assert len(list((beside.folder / "logs").glob("teacher*.log"))) == len(names)
