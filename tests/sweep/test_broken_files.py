"""Files of a sweep that are broken or of another version: one line that names the file, and the other runs go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from killing import kill_while_writing
from lolcats import LolcatsError
from lolcats.cli.sweep_tables import print_results
from lolcats.config import dump_config
from lolcats.runs.folder import RunFolder
from lolcats.sweep import Sweep, SweepMeasurement, check_runs, gather, load_sweep, make_plan, read_failures, run_sweep
from lolcats.sweep import job as job_module
from lolcats.sweep.measure import Measured
from lolcats.sweep.runner import hold_folder

NONSENSE = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"runs": 3}', b'{"runs": [1]}']


def test_a_sweep_that_was_killed_before_it_was_written_is_begun_again(make_sweep: Callable[..., Sweep]) -> None:
    sweep = make_sweep(grid={"seed": [0]})
    sweep.folder.mkdir(parents=True)
    kill_while_writing(sweep.folder / "sweep.yaml", "file")
    assert any(sweep.folder.iterdir())
    check_runs(sweep)


@pytest.mark.parametrize("content", NONSENSE, ids=lambda content: str(content[:12]))
def test_a_broken_table_is_named(make_sweep: Callable[..., Sweep], content: bytes) -> None:
    sweep = make_sweep(grid={"seed": [0, 1]})
    sweep.folder.mkdir(parents=True)
    (sweep.folder / "results.json").write_bytes(content)
    with pytest.raises(LolcatsError, match=r"results.json.*delete it: the table is made anew"):
        read_failures(sweep)


@pytest.mark.parametrize(
    "content",
    [
        *NONSENSE[:6],
        b'{"tasks": [1]}',
        b'{"tasks": {"piqa": {"rows": []}}}',
        b'{"tasks": {"piqa": {"settings": {}, "rows": [{"task": "piqa"}]}}}',
        b'{"recall": {"passkey.64": {"settings": {}, "cell": {"score": 1}}}}',
        b'{"recall": {"passkey.64": 1}}',
    ],
    ids=lambda content: str(content[:30]),
)
def test_broken_measurements_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "measure.json").write_bytes(content)
    with pytest.raises(LolcatsError, match=r"measure.json .*delete it: it is measured anew|measure.json: expected"):
        Measured(tmp_path / "measure.json")


@pytest.mark.slow
def test_a_run_with_broken_files_fails_alone(make_sweep: Callable[..., Sweep], finish: Callable[..., None]) -> None:
    """Every run of a sweep is done or told; with --overwrite the broken one is made anew."""
    sweep = make_sweep(grid={"seed": [0, 1]})
    broken = RunFolder.of(sweep.runs[0].config)
    finish(sweep, sweep.runs[0])
    file = broken.path / "measurements" / "measure.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text("{")
    table = run_sweep(sweep, "study.yaml")
    assert [row.status for row in table.runs] == ["failed", "finished"]
    assert "measure.json cannot be used: it is not JSON" in table.runs[0].error and "\n" not in table.runs[0].error
    assert [row.status for row in gather(sweep, {}).runs] == ["failed", "finished"]
    with pytest.raises(LolcatsError, match=r"measure.json cannot be used: it is not JSON"):
        make_plan(sweep)
    assert [row.status for row in run_sweep(sweep, "study.yaml", overwrite=["seed-0"]).runs] == ["finished"] * 2


@pytest.mark.slow
def test_a_measurement_that_was_kept_must_hold_numbers(
    make_sweep: Callable[..., Sweep], finish: Callable[..., None]
) -> None:
    sweep = make_sweep(grid={"seed": [0]})
    finish(sweep)
    kept = SweepMeasurement("own", lambda config, folder: {"own.number": 1.0})
    run_sweep(sweep, "study.yaml", measurements=[kept])
    file = RunFolder.of(sweep.runs[0].config).path / "measurements" / "own.json"
    for content in ('{"own.number": "many"}', "[1]"):
        file.write_text(content)
        row = gather(sweep, {}, [kept]).runs[0]
        assert row.status == "failed" and "own.json" in row.error and row.columns == {}


def test_settings_of_another_version_are_told(make_sweep: Callable[..., Sweep]) -> None:
    """A key that is missing has its default, one that is unknown or gone is named."""
    sweep = make_sweep(grid={"seed": [0]})
    file = RunFolder.of(sweep.runs[0].config).config_file
    file.parent.mkdir(parents=True)
    (sweep.folder / "sweep.yaml").write_text(sweep.text)
    text = dump_config(sweep.runs[0].config)
    file.write_text(text.replace("  window_kind: sliding\n", ""))
    check_runs(sweep)
    file.write_text(text + "flux: 3\n")
    with pytest.raises(LolcatsError, match=r"(?s)made with other settings: seed-0 \(.*flux"):
        check_runs(sweep)
    file.write_text(text.replace("  local: {}\n", "  local: {python-docs: /data/copy}\n").replace(
        "  sources:\n", "  sources:\n  - python-docs\n", 1))  # fmt: skip
    with pytest.raises(LolcatsError, match=r"data.local.python-docs: /data/copy -> None"):
        check_runs(sweep)


@pytest.mark.slow
def test_one_lock_by_whatever_link(sweep_file: Callable[..., Path], tmp_path: Path) -> None:
    file = sweep_file(grid={"seed": [0]})
    sweep = load_sweep(file, ["name=real"])
    sweep.folder.mkdir(parents=True)
    sweep.folder.with_name("linked").symlink_to(sweep.folder)
    linked = load_sweep(file, ["name=linked"])
    with (
        hold_folder(sweep),
        pytest.raises(LolcatsError, match=r"another `lolcats sweep` works in"),
        hold_folder(linked),
    ):
        pass
    assert [row.status for row in run_sweep(linked, file).runs] == ["finished"]
    assert (sweep.folder / "seed-0" / "model" / "config.json").is_file()


@pytest.mark.slow
def test_a_run_behind_a_link_is_replaced_where_it_is(
    make_sweep: Callable[..., Sweep], finish: Callable[..., None], tmp_path: Path
) -> None:
    sweep = make_sweep(grid={"seed": [0]})
    finish(sweep)
    place = RunFolder.of(sweep.runs[0].config).path
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "old").write_text("x")
    assert [row.status for row in run_sweep(sweep, "study.yaml", overwrite=["*"]).runs] == ["finished"]
    assert place.is_symlink() and not (tmp_path / "elsewhere" / "old").exists()


def test_values_are_shown_as_they_are(make_sweep: Callable[..., Sweep], text_file: Path, tmp_path: Path) -> None:
    """Square brackets are no markup."""
    (tmp_path / "[red]").mkdir()
    odd = tmp_path / "[red]" / "[link=x].txt"
    odd.write_text(text_file.read_text())
    values: list[Any] = [[str(odd)], [str(text_file)]]
    sweep = make_sweep(grid={"data.sources": values})
    out = Console(file=StringIO(), width=300)
    capture = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", capture)
        print_results(out, gather(sweep, {}), {})
    assert "[red]" in capture.getvalue() and "[link=x].txt" in capture.getvalue()


@pytest.mark.slow
def test_an_unexpected_error_of_one_run_is_told_and_the_others_go_on(
    make_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = job_module.linearize

    def fail(config: Any, **options: Any) -> Any:
        if config.seed == 0:
            raise RecursionError("too\ndeep")
        return original(config, **options)

    monkeypatch.setattr(job_module, "linearize", fail)
    sweep = make_sweep(grid={"seed": [0, 1]})
    table = run_sweep(sweep, "study.yaml", describe=lambda error: f"{type(error).__name__}: {error}")
    assert [(row.status, row.error) for row in table.runs] == [("failed", "RecursionError: too deep"), ("finished", "")]
    assert json.loads((sweep.folder / "results.json").read_text())["runs"][0]["error"] == "RecursionError: too deep"
