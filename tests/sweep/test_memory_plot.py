"""Perplexity and recall against memory: what is read from runs, sweeps and files, and what is drawn of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lolcats import LolcatsError, load_config
from lolcats.cli.app import main
from lolcats.config import dump_config
from lolcats.evaluation.memory import TextMemory
from lolcats.runs.results import Results
from lolcats.sweep.memory_plot import plot_memory
from lolcats.sweep.points import Point, line_of, read_points, to_csv

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A folder that looks like a finished run."""

    def make(name: str, *overrides: str, tokens: float | None = 64.0, teacher: float = 10.0, **scores: float) -> Path:
        folder = tmp_path / "study" / name
        (folder / "model").mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_config(load_config(None, [f"name={name}", *overrides])))
        results = Results()
        results.memory = None if tokens is None else TextMemory(bytes=1, kv_tokens=tokens, layers=[])
        results.perplexity = {"teacher": teacher, **scores}
        (folder / "results.json").write_text(results.text())
        return folder

    return make


def test_the_points_of_a_sweep(make_run: Callable[..., Path]) -> None:
    blend = ["linearization.mixer=blend", "linearization.kept.pairs=4"]
    first = make_run("a", *blend, "linearization.far=none", student=12.0, equal_window=14.0, trained_window=13.0)
    make_run("b", "linearization.mixer=hybrid", tokens=128.0, student=11.0, near_only=20.0)
    make_run("c")  # not finished
    (first / "measurements").mkdir()
    cell = {"cell": {"score": 0.25}}
    (first / "measurements" / "measure.json").write_text(json.dumps({"recall": {"passkey.1024": cell}}))
    points = read_points([first.parent])
    assert [(point.line, point.kv_tokens, point.perplexity) for point in points] == [
        ("blend, kept pairs, no far half", 64.0, 12.0),
        ("window, nothing trained", 64.0, 14.0),
        ("window, trained", 64.0, 13.0),
        ("teacher", None, 10.0),
        ("hybrid", 128.0, 11.0),
        ("teacher", None, 10.0),
    ]
    assert points[0].recall == {"passkey.1024": 0.25} and not points[1].recall


def test_recall_of_a_file_goes_to_the_model_that_it_is_about(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("a", student=12.0, equal_window=14.0)
    file = tmp_path / "recall.json"
    scores = {"student": 0.5, "equal_window": 0.25, "teacher": 1.0, "window_only": 0.125}
    cells = [{"variant": name, "task": "vt", "length": 512, "score": score} for name, score in scores.items()]
    file.write_text(json.dumps({"model": str(run / "model"), "cells": cells}))
    assert [point.recall.get("vt.512") for point in read_points([file, run])] == [0.5, 0.25, 1.0]
    file.write_text(json.dumps({"model": "elsewhere", "cells": cells}))
    with pytest.raises(LolcatsError, match="is about elsewhere, which is not among the sources; name its run too"):
        read_points([run, file])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["linearization.mixer=hybrid"], "hybrid"),
        (["linearization.mixer=hybrid", "finetune.enabled=false"], "hybrid, no stage 2"),
        (["linearization.mixer=blend", "linearization.far=gated_delta"], "blend, no pairs, far gated delta"),
        (["linearization.mixer=blend", "linearization.kept.pairs=0", "linearization.far=none"], "window, trained"),
        (
            [
                "linearization.mixer=blend",
                "linearization.bits=8",
                "linearization.far=none",
                "linearization.kept.pairs=4",
            ],
            "blend, kept pairs, no far half, 8 bits",
        ),
        (
            ["linearization.mixer=blend", "linearization.budget=heads", "linearization.split=[[4, 2]]"],
            "blend, kept pairs, far linear, shared by heads",
        ),
    ],
)
def test_kinds_of_layers(settings: list[str], line: str) -> None:
    config = load_config(None, settings)
    assert line_of(config.linearization, config.finetune.enabled) == line


def test_what_cannot_be_plotted_is_told_in_a_line(make_run: Callable[..., Path], tmp_path: Path) -> None:
    old, new, none = make_run("old", tokens=None, student=1.0), make_run("new", student=12.0), make_run("none")
    other = make_run("other", teacher=17.0, student=18.0)
    table = tmp_path / "table.csv"
    table.write_text("line,kv_tokens,perplexity,passkey\nhybrid,3,4,5\n")
    for sources, problem in {
        (old,): "does not say its memory",
        (none,): "nothing to plot, no student",
        (new, other): r"not measured on the same text, .* 10\.00 in .*new and 17\.00 in .*other; plot them apart",
        (tmp_path / "nowhere",): "is not there; expected the folder of a run",
        (tmp_path,): "nothing to plot; expected the folder of a run",
        (table,): "the column 'passkey' is not TASK.LENGTH",
    }.items():
        with pytest.raises(LolcatsError, match=problem):
            read_points(sources)
    pytest.importorskip("matplotlib")
    with pytest.raises(LolcatsError, match="no student has a perplexity or recall"):
        plot_memory([Point("teacher", None, 2.0), Point("hybrid", 4.0)], tmp_path / "x.png")
    with pytest.raises(LolcatsError, match=r"give a name that ends in \.png"):
        plot_memory([Point("hybrid", 4.0, 3.0)], tmp_path / "x.txt")


def test_the_picture_of_the_documentation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its table is read and written as it was."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "memory.png"
    code = main(["plot", str(DOCS / "memory.csv"), "--output", str(picture)])
    out = capsys.readouterr()
    assert code == 0, out.err
    assert "12 points of 5 lines" in out.out
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert (tmp_path / "memory.csv").read_text() == (DOCS / "memory.csv").read_text()
    assert to_csv(read_points([tmp_path / "memory.csv"])) == (DOCS / "memory.csv").read_text()


def test_windows_are_of_the_bits_of_their_student(make_run: Callable[..., Path]) -> None:
    """A window of 8 bits holds twice the tokens, so it is no point of the line of whole numbers."""
    blend = ["linearization.mixer=blend", "linearization.bits=8", "linearization.far=none"]
    folder = make_run("few", *blend, student=12.0, equal_window=14.0, trained_window=13.0)
    lines = [point.line for point in read_points([folder])]
    assert lines == ["window, 8 bits, trained", "window, 8 bits, nothing trained", "window, 8 bits, trained", "teacher"]
