"""`lolcats bench`, in this process."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lolcats.evaluation import speed

from .conftest import Run

SMALL = ["--batch", "1,2", "--context", "9,17", "--tokens", "2", "--repeat", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte tells the bandwidth as well, for a test."""
    real = speed.copy_bandwidth
    monkeypatch.setattr(speed, "copy_bandwidth", lambda device: real(device, 2**20))


def rows_of(text: str) -> list[list[str]]:
    """The cells of the lines about a model."""
    return [line.split() for line in text.splitlines() if line.lstrip().startswith(("student", "teacher"))]


def read_csv(name: str) -> list[dict[str, str]]:
    """The lines of a file with a header."""
    return list(csv.DictReader(io.StringIO(Path(name).read_text())))


@pytest.mark.slow
def test_a_model_by_a_recipe(cli: Run, place: Path) -> None:
    """Table, CSV, JSON and plot have the same rows, with where and when they were measured."""
    files = ["--csv", "x.csv", "--json", "x.json", "--plot", "x.png"]
    answer = cli("bench", place / "teacher", "--recipe", "hybrid", *SMALL, *files)
    assert answer.code == 0, answer.err
    lines = read_csv("x.csv")
    content = json.loads(Path("x.json").read_text())
    assert len(lines) == len(content["rows"]) == 8
    kept = {(line["variant"], line["batch"], line["context"]): line for line in lines}
    speeds, memory = rows_of(answer.out)[:8], rows_of(answer.out)[8:]
    assert [tuple(cells[:1] + cells[2:4]) for cells in speeds] == [
        (variant, batch, n) for batch in "12" for n in ("9", "17") for variant in ("student", "teacher")
    ]
    for cells in speeds:
        line = kept[cells[0], cells[2], cells[3]]
        assert float(cells[6].replace(",", "")) == pytest.approx(1e3 * float(line["step_seconds"]), rel=0.01)
        assert line["engine"] == "transformers" and line["date"] and line["torch"] == torch.__version__
        assert line["device"].startswith("cpu") and float(line["text_memory"]) == float(line["text_memory_computed"])
    assert len(memory) == 8 and all(cells[-4:-2] == cells[-2:] for cells in memory)
    for part in ("untrained", "GB/s of a copy", "teacher sdpa, student hybrid", "x.png", "lolcats "):
        assert part in answer.out, answer.out
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_finished_run_and_its_teacher(cli: Run, finished: Path) -> None:
    answer = cli("bench", finished, *SMALL)
    assert answer.code == 0, answer.err
    assert {cells[0] for cells in rows_of(answer.out)} == {"student", "teacher"} and "untrained" not in answer.out
    assert {cells[0] for cells in rows_of(cli("bench", finished, "--teacher", "none", *SMALL).out)} == {"student"}


@pytest.mark.slow
def test_a_model_that_is_not_linearized(cli: Run, place: Path) -> None:
    answer = cli("bench", place / "teacher", *SMALL, "--random-weights")
    assert answer.code == 0 and "is not linearized; --recipe" in answer.out and "random" in answer.out
    assert {cells[0] for cells in rows_of(answer.out)} == {"teacher"}


@pytest.mark.slow
def test_out_of_memory_is_a_cell(cli: Run, place: Path) -> None:
    words = ["bench", place / "teacher", "--context", "9", "--tokens", "2", "--repeat", "1", "--device", "cpu"]
    answer = cli(*words, "--batch", "1,999999999", "--csv", "x.csv", "--plot", "x.png")
    assert answer.code == 0 and Path("x.png").exists(), answer.err
    assert "out of memory" in answer.out, "in one line, for memory; cells of speeds may be broken"
    first, second = read_csv("x.csv")
    assert first["step_seconds"] and (second["step_seconds"], second["ratio"], second["text_memory"]) == ("", "", "")


@pytest.mark.slow
def test_what_was_measured_before_ctrl_c(cli: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the table, and in every file that was named."""
    real = speed.measure_speed

    def interrupted(*given: Any) -> Iterator[Any]:
        for number, row in enumerate(real(*given)):
            if number == 3:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(speed, "measure_speed", interrupted)
    answer = cli("bench", place / "teacher", *SMALL, "--csv", "x.csv", "--json", "x.json", "--plot", "x.png")
    assert answer.code == 130 and answer.err == "interrupted; rows that were measured are above and in the files\n"
    assert len(rows_of(answer.out)) == 2 * 3 and Path("x.png").exists()
    assert len(Path("x.csv").read_text().splitlines()) == 4 and len(json.loads(Path("x.json").read_text())["rows"]) == 3


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--batch", "0"], ["--batch must be numbers from 1 on", "'0'"]),
        (["--batch", "1,x"], ["--batch", "1,x"]),
        (["--context", "-1"], ["--context"]),
        (["--context", "4096"], ["context of 2,048", "--beyond-context"]),
        (["--tokens", "0"], ["--tokens"]),
        (["--repeat", "0"], ["--repeat"]),
        (["--device", "tpu"], ["unknown device 'tpu'"]),
        (["--plot", "x.txt"], ["x.txt", ".png"]),
        (["--csv", "gone/x.csv"], ["no folder gone"]),
        (["--recipe", "hybird"], ["hybird"]),
        (["--engine", "sglang"], ["unknown engine 'sglang'", "vllm"]),
        (["--vllm-options", "{}"], ["--vllm-options", "--engine vllm"]),
        (["--recipe", "hybrid", "--teacher", "demo"], ["--teacher demo", "leave it out"]),
    ],
)
def test_refusals(cli: Run, place: Path, words: list[str], parts: list[str]) -> None:
    cli("bench", place / "teacher", *words).refused(*parts)


def test_vllm_refusals(cli: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is read; what vLLM itself refuses is tested where it is."""
    words = ["bench", place / "teacher", "--engine", "vllm"]
    monkeypatch.setattr("lolcats.serving.server.installed_version", lambda: None)
    cli(*words).refused("vLLM is not installed; pip install", "the engine transformers")
    monkeypatch.setattr("lolcats.serving.server.installed_version", lambda: "0.32.0")
    for options in ("{", "[1]"):
        cli(*words, "--vllm-options", options).refused("--vllm-options")


@pytest.mark.slow
def test_what_models_cannot_be(cli: Run, place: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("bench", finished, "--recipe", "hybrid").refused("is linearized already")
    cli("bench", finished, "--teacher", finished / "model", *SMALL).refused("is linearized itself")
    cli("bench", "./no-model").refused("no such folder")
    cli("bench", finished, "--teacher", "./gone").refused("./gone", "no such folder")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cli("bench", "./no-model", "--plot", "x.png").refused("matplotlib")
