"""`lolcats sweep` as a person uses it: plan, run, read, break, go on."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from lolcats.config.strict_yaml import write_yaml

from .conftest import TINY, Run


@pytest.fixture
def study(place: Path, tmp_path: Path) -> Path:
    """A sweep of two ranks in the working folder, each run about a second."""
    settings: dict[str, object] = {"model": str(place / "teacher"), "data.sources": [str(place / "text.txt")]}
    for setting in TINY:
        key, _, value = setting.partition("=")
        if key != "finetune.rank":
            settings[key] = int(value) if value.isdecimal() else value
    content = {"base": "hybrid", "settings": settings, "grid": {"finetune.rank": [2, 3]}}
    (tmp_path / "study.yaml").write_text(write_yaml(content))
    return tmp_path / "study.yaml"


@pytest.mark.slow
def test_plan_run_and_table(cli: Run, study: Path, tmp_path: Path) -> None:
    """The story of a sweep that goes well."""
    plan = cli("sweep", study, "--plan", "--tokens-per-second", "64,32")
    assert plan.code == 0, plan.err
    lines = plan.out.splitlines()
    assert lines[1].split()[:7] == ["1", "rank-2", "new", "2", "128", "2", "128"]
    assert lines[2].split()[:9] == ["2", "rank-3", "new", "as", "1", "0", "2", "128", "4"]
    assert "left to train: 128 tokens of stage 1, 256 of stage 2" in plan.out
    assert "time: 10 s one after the other" in plan.out and "(given)" in plan.out and "disk: " in plan.out
    assert not (tmp_path / "runs").exists(), "a plan makes nothing"

    done = cli("sweep", study)
    assert done.code == 0 and done.err == ""
    assert "[1/2] rank-2" in done.out and "stage 1 is that of rank-2" in done.out
    assert "runs/study: results.json, results.csv, results.md" in done.out
    results = json.loads((tmp_path / "runs/study/results.json").read_text())
    for row in results["runs"]:
        assert f" {row['columns']['perplexity.student']:,.0f} " in done.out  # random weights: thousands

    again = cli("sweep", study, "--table")
    assert again.code == 0 and "[1/2]" not in again.out and "KL of" in again.out
    later = cli("sweep", study, "--plan")
    assert "2 finished; left to train: 0 tokens" in later.out and "measured in 2 finished runs" in later.out


@pytest.mark.slow
def test_what_the_section_measure_asks_for(cli: Run, study: Path) -> None:
    """Told by the plan, measured of student and teacher, and shown; mistakes are found by the plan."""
    words = ["measure.recall=[passkey]", "measure.lengths=[600, 500]", "measure.samples=2"]
    plan = cli("sweep", study, *words, "--plan")
    assert "each student and the teacher will be measured on passkey at 600, 500 tokens" in plan.out
    cli("sweep", study, *words, "measure.tasks=piqqa", "--plan").refused("unknown task 'piqqa'", "did you mean piqa")
    cli("sweep", study, "measure.recal=passkey").refused("measure.recal: unknown key; did you mean measure.recall?")
    assert not Path("runs").exists()
    done = cli("sweep", study, *words)
    assert done.code == 0 and done.err == ""
    assert "measuring: student, passkey, 500 tokens" in done.out and "recall, % found" in done.out
    assert "passkey 500" in done.out and "\nteacher  finished" in done.out
    assert cli("sweep", "runs/study/sweep.yaml", "--table").out.count("teacher  finished") == 1
    again = cli("sweep", "runs/study/sweep.yaml", "measure.samples=1", "--plan")
    assert "0 finished; left to train: 0 tokens" in again.out and " trained " in again.out


@pytest.mark.slow
def test_the_written_sweep_and_a_single_run_go_on_by_themselves(cli: Run, study: Path) -> None:
    """`sweep.yaml` beside the results, and `config.yaml` of a run, are all that is needed."""
    assert cli("sweep", study, "name=x", "finetune.lr=1e-3", "--only", "rank-2").code == 0
    study.unlink()
    answer = cli("sweep", "runs/x/sweep.yaml")
    assert answer.code == 0 and "1 of 2 runs are finished already" in answer.out and "[1/1] rank-3" in answer.out
    assert cli("linearize", "runs/x/rank-3/config.yaml", "--resume").code == 0


@pytest.mark.slow
def test_a_failed_run_is_told_at_the_end(cli: Run, study: Path) -> None:
    """The exit code says that something failed, and the line what; the rest is done."""
    study.write_text(study.read_text().replace("finetune.rank:", "linearization.layers:").replace("- 2", "- [7]")
                     .replace("- 3", "- [1]"))  # fmt: skip
    answer = cli("sweep", study)
    answer.refused("1 of 2 runs failed: layers-7: layers [7] cannot be linearized")
    assert answer.code == 1 and "failed" in answer.out and Path("runs/study/layers-1/model").is_dir()
    plan = cli("sweep", study, "--plan")
    assert plan.code == 0 and "layers-7 would fail: layers [7] cannot be linearized" in plan.out


@pytest.mark.slow
def test_interrupted_and_gone_on_with(cli: Run, study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after stage 1."""

    def interrupt(run: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(import_module("lolcats.runs.recipe"), "finetune", interrupt)
        answer = cli("sweep", study)
    assert answer.code == 130 and answer.err.startswith("interrupted; finished runs and last checkpoints are kept")
    plan = cli("sweep", study, "--plan").out.splitlines()[1].split()
    assert plan[:7] == ["1", "rank-2", "started", "2", "0", "2", "128"], "stage 1 need not be done again"
    assert cli("sweep", study).code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.yaml"], "no sweep file nowhere.yaml"),
        (["study.yaml", "finetune.rnk=3"], "finetune.rnk: unknown key; did you mean finetune.rank?"),
        (["study.yaml", "finetune.rank=3"], "override finetune.rank: the sweep itself sets this key"),
        (["study.yaml", "seed"], "override 'seed': expected key=value"),
        (["study.yaml", "name=a b"], "name: expected letters"),
        (["study.yaml", "--only", "rank-5"], "rank-5: no run of study has this name; did you mean rank-"),
        (["study.yaml", "--plan", "--only", "zzz"], "its runs are rank-2, rank-3"),
        (["study.yaml", "--plan", "--tokens-per-second", "3"], "expected two numbers above 0, such as 300000,80000"),
        (["study.yaml", "--calibrate"], "belong to --plan"),
        (["study.yaml", "--plan", "--table"], "give one of them"),
        (["study.yaml", "--plan", "--overwrite", "*"], "run nothing"),
        (["study.yaml", "--jobs", "0"], "--jobs"),
        (["study.yaml", "--table"], "nothing of this sweep has been run"),
    ],
    ids=str,
)
def test_mistakes(cli: Run, study: Path, words: list[str], said: str) -> None:
    """One line each, and nothing is made."""
    cli("sweep", *words).refused(said)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_changed_settings(cli: Run, study: Path) -> None:
    """A run is not mixed with one of other settings."""
    assert cli("sweep", study, "--only", "rank-2").code == 0
    cli("sweep", study, "finetune.lr=5e-3").refused("rank-2 (finetune.lr: 0.0006 -> 0.005)", "--overwrite RUN")
    cli("sweep", study, "finetune.lr=5e-3", "--plan").refused("made with other settings")
    assert cli("sweep", study, "finetune.lr=5e-3", "--overwrite", "*", "--only", "rank-2").code == 0
