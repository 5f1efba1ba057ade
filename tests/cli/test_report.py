"""`lolcats report` of a real run, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from lolcats.report import gather

from .conftest import Run

QUICK: list[str] = []


@pytest.mark.slow
def test_a_real_run(cli: Run, finished: Path) -> None:
    """The numbers of `results.json` and `evaluate`, memory and trained parameters as they are; from the model too."""
    measured = cli("evaluate", finished, "--json", "numbers.json", "--control", "window_only")
    assert measured.code == 0
    answer = cli("report", finished, "--results", "numbers.json", *QUICK)
    assert answer.code == 0 and answer.err == "" and "report.html" in answer.out and "report_files" in answer.out
    results = json.loads((finished / "results.json").read_text())
    with Path("report_files/perplexity.csv").open() as file:
        rows = list(csv.DictReader(file))
    own = {row["variant"]: float(row["perplexity"]) for row in rows if "when it was made" in row["text"]}
    assert sorted(own.values()) == sorted(results["perplexity"].values())
    scores = json.loads(Path("numbers.json").read_text())["scores"]
    given = {row["variant"]: float(row["perplexity"]) for row in rows if "numbers.json" in row["text"]}
    assert given["student"] == scores["student"]["perplexity"] and len(given) == len(scores)
    page = Path("report.html").read_text()
    assert "What the numbers say" in page and len(page) < 5e6
    assert cli("report", finished / "model", "--output", "model.html", *QUICK).code == 0
    assert f"{own['student']:.2f}" in Path("model.html").read_text()


def test_sizes_are_those_of_the_run(finished: Path) -> None:
    """Trained parameters are the numbers in the checkpoints of both stages, the state that of results.json."""
    (subject,) = gather([finished])
    assert subject.sizes is not None and subject.unfinished == ""
    for stage, count in subject.sizes.trained.items():
        with safe_open(finished / "checkpoints" / stage / "best.safetensors", framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("parameter:")]  # noqa: SIM118  # not a dict
            shapes = [file.get_slice(name).get_shape() for name in names]
        numbers = 0
        for shape in shapes:
            size = 1
            for side in shape:
                size *= side
            numbers += size
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
