"""What is read from folders and files: every number as it was written, and one clear line for what is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lolcats.config import dump_config, load_config
from lolcats.errors import LolcatsError
from lolcats.report import gather
from lolcats.runs.artefact import RECIPE_FILE, RESULTS_FILE
from lolcats.runs.folder import RunFolder

from .made import EVIL, LAYERS, PERPLEXITY, make_analysis, make_cells, make_run


def test_a_run_is_read_whole(run: Path) -> None:
    """Results, metrics, LoRA, analysis, and the three kinds of files that lie in its folder."""
    (subject,) = gather([run])
    assert subject.name == run.name and subject.unfinished == "" and subject.notes == []
    assert subject.results == RunFolder(run).results() and subject.results.perplexity == PERPLEXITY
    assert len(subject.metrics) == 2 * 44 and len(subject.lora) == 5
    assert [layer.layer for layer in subject.layers] == list(range(LAYERS))
    cells = {(cell.variant, cell.task, cell.length): cell for cell in make_cells()}
    assert subject.cells() == cells
    own, beyond = subject.scores()
    assert own.perplexity == beyond.perplexity == PERPLEXITY and beyond.context == 2048
    assert beyond.by_position["teacher"]["2048-4096"] == 90.0 * PERPLEXITY["teacher"]
    (benchmark,) = subject.benchmarks
    assert benchmark.rows[0].scores["student"].mean == 0.698765432


def test_a_run_that_is_not_finished_says_so(tmp_path: Path) -> None:
    """With how far it is; it is read all the same."""
    (subject,) = gather([make_run(tmp_path, complete=False)])
    assert subject.unfinished == "not finished: stage 1 not begun, stage 2 not begun, no model yet"
    assert subject.resume_command == f"lolcats linearize {tmp_path}/made/config.yaml --resume"
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.yaml").write_text(dump_config(load_config("recommended")))
    (bare,) = gather([tmp_path / "bare"])
    assert bare.unfinished and not list(bare.scores()) and bare.analysis is None


def test_a_model_holds_a_copy_of_the_results(run: Path, tmp_path: Path) -> None:
    """Its folder alone gives the numbers that the run had."""
    shutil.copy(run / "results.json", tmp_path / RESULTS_FILE)
    shutil.copy(run / "config.yaml", tmp_path / RECIPE_FILE)
    (subject,) = gather([tmp_path])
    assert subject.results.perplexity == PERPLEXITY and subject.metrics == [] and subject.unfinished == ""


def test_files_from_elsewhere_go_to_their_run(run: Path, tmp_path: Path) -> None:
    """By the model that they name, before those in its folder; a run that was moved goes by its name."""
    other = make_run(tmp_path, "other")
    content = json.loads((run / "recall.json").read_text())
    content["cells"][0]["score"] = 0.123456789012345
    file = tmp_path / "again.json"
    for model in (str(other), str(other / "model"), "gone/other/model"):
        file.write_text(json.dumps(content | {"model": model}))
        first, second = gather([run, other], [file])
        cell = content["cells"][0]
        key = (cell["variant"], cell["task"], cell["length"])
        assert second.cells()[key].score == 0.123456789012345 != first.cells()[key].score
    for model, part in ((str(tmp_path), "not among the runs"), ("gone/third", "gone/third")):
        file.write_text(json.dumps(content | {"model": model}))
        with pytest.raises(LolcatsError, match=part):
            gather([run, other], [file])


def test_what_lies_in_a_folder_cannot_break_the_report(tmp_path: Path) -> None:
    """What is broken, or about another model, is a note; what is something else is passed over."""
    run = make_run(tmp_path)
    (run / "list.json").write_text("[1]")
    (run / "mine.json").write_text('{"a": 1}')
    (run / "broken.json").write_text('{"cells": [{"variant": 1}]}')
    content = json.loads((run / "recall.json").read_text()) | {"model": str(tmp_path)}
    (run / "stray.json").write_text(json.dumps(content))
    (subject,) = gather([run])
    assert len(subject.notes) == 3 and len(subject.recalls) == 1
    for name in ("list.json", "broken.json", "stray.json"):
        assert sum(name in note for note in subject.notes) == 1


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("gone", None, "is not there"),
        ("empty", {}, "no run and no linearized model"),
        ("bad", {"config.yaml": "a: ["}, "config.yaml"),
        ("torn", {"config.yaml": "name: x\n", "results.json": "{"}, "not JSON"),
        ("odd", {"config.yaml": "name: x\n", "analysis.json": '{"layers": 1}'}, "analysis.json"),
    ],
)
def test_what_is_no_run_is_named(tmp_path: Path, name: str, content: dict[str, str] | None, part: str) -> None:
    if content is not None:
        (tmp_path / name).mkdir()
        for file, text in content.items():
            (tmp_path / name / file).write_text(text)
    with pytest.raises(LolcatsError, match=part):
        gather([tmp_path / name])


def test_files_that_are_none_are_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("{}")
    for name, part in (("gone.json", "is not there"), ("empty.json", "holds no numbers")):
        with pytest.raises(LolcatsError, match=part):
            gather([run], [tmp_path / name])
    with pytest.raises(LolcatsError, match="named twice"):
        gather([run, run / ".." / run.name])


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """By their folders."""
    runs = [make_run(tmp_path / name, "same") for name in ("a", "b")]
    assert [subject.name for subject in gather(runs)] == [str(run) for run in runs]


def test_the_made_up_analysis_is_as_it_is_written(run: Path) -> None:
    """What the other tests compare with is what the files hold."""
    (subject,) = gather([run])
    assert subject.analysis is not None and subject.analysis.kept is not None
    assert subject.analysis.kept[0].tokens[0] == EVIL
    copy = run.parent / "copy"
    copy.mkdir(exist_ok=True)
    assert subject.analysis.layers == make_analysis(copy).layers
