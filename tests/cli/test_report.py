"""`lolcats report` of a real run, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from lolcats.report import gather

from .conftest import Run


@pytest.mark.slow
def test_a_real_run(cli: Run, finished: Path) -> None:
    """The numbers of `results.json` and `evaluate`, memory and trained parameters as they are; from the model too."""
    run = shutil.copytree(finished, Path("run"))
    measured = cli("evaluate", run, "--json", "numbers.json", "--control", "window_only")
    assert measured.code == 0
    answer = cli("report", run, "--results", "numbers.json", "--no-analysis")
    assert answer.code == 0 and answer.err == "" and "report.html" in answer.out and "report_files" in answer.out
    results = json.loads((run / "results.json").read_text())
    with (run / "report_files/perplexity.csv").open() as file:
        rows = list(csv.DictReader(file))
    own = {row["variant"]: float(row["perplexity"]) for row in rows if "when it was made" in row["text"]}
    assert sorted(own.values()) == sorted(results["perplexity"].values())
    scores = json.loads(Path("numbers.json").read_text())["scores"]
    given = {row["variant"]: float(row["perplexity"]) for row in rows if "numbers.json" in row["text"]}
    assert given["student"] == scores["student"]["perplexity"] and len(given) == len(scores)
    page = (run / "report.html").read_text()
    assert "What the numbers say" in page and len(page) < 5e6
    assert cli("report", run / "model", "--no-analysis").code == 0
    assert f"{own['student']:,.2f}" in Path("report.html").read_text()


@pytest.mark.slow
def test_what_was_not_analysed_is(cli: Run, finished: Path) -> None:
    """Once, then the analysis is there; anew where something else is asked for, with texts and prompts of the user."""
    run = shutil.copytree(finished, Path("run"))
    words = ["report", run, "--segments", "1", "--prompt", "the cat <b>", "--text", "the moon and the river"]
    assert cli(*words).code == 0
    page = (run / "report.html").read_text()
    assert "the cat &lt;b&gt;" in page and "the moon and the river" in page and 'id="attention"' in page
    kept = (run / "analysis.json").read_bytes()
    assert cli("report", run).code == 0 and (run / "analysis.json").read_bytes() == kept
    assert cli("report", run, "--layer", "1", "--head", "2", "--segments", "1").code == 0
    assert [layer["layer"] for layer in json.loads((run / "analysis.json").read_text())["layers"]] == [1]
    before = (run / "analysis.json").read_bytes()
    cli("report", run, "--layer", "99").refused("99")
    cli("report", run, "--text", " ").refused("the text ' ' is empty")
    assert (run / "analysis.json").read_bytes() == before


def test_a_teacher_that_is_gone_is_a_note(cli: Run, finished: Path) -> None:
    """The report is made without the analysis, and says why."""
    run = shutil.copytree(finished, Path("run"))
    for file in (run / "config.yaml", run / "model" / "lolcats_recipe.yaml"):
        file.write_text(file.read_text().replace("/teacher", "/gone"))
    answer = cli("report", run)
    assert answer.code == 0 and "not analysed: " in answer.out and "gone" in answer.out
    assert "not analysed: " in (run / "report.html").read_text()


def test_sizes_are_those_of_the_run(finished: Path) -> None:
    """Trained parameters are the numbers in the checkpoints of both stages, the state that of results.json."""
    (subject,) = gather([finished])
    assert subject.sizes is not None and subject.unfinished == ""
    for stage, count in subject.sizes.trained.items():
        with safe_open(finished / "checkpoints" / stage / "best.safetensors", framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("parameter:")]  # noqa: SIM118  # not a dict
            shapes = [file.get_slice(name).get_shape() for name in names]
        numbers = sum(math.prod(shape) for shape in shapes)
        assert numbers == count > 0, stage
    assert subject.results.memory is not None
    assert subject.sizes.facts.state_bytes == subject.results.memory.bytes


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["gone"], ["gone is not there"]),
        (["."], ["no run and no linearized model"]),
        (["RUN", "--output", "x.pdf"], ["ends in .html", "x.pdf"]),
        (["RUN", "--output", "no/x.html"], ["no folder no"]),
        (["RUN", "--results", "gone.json"], ["gone.json is not there"]),
        (["RUN", "RUN"], ["named twice"]),
    ],
)
def test_refusals(cli: Run, finished: Path, words: list[str], parts: list[str]) -> None:
    """One line each."""
    cli("report", *(finished if word == "RUN" else word for word in words)).refused(*parts)
