"""Whole sweeps of a tiny model: resumed, failing, sharing stage 1, and side by side."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from killing import Killed
from lolcats import LolcatsError
from lolcats.runs import loading
from lolcats.runs.folder import RunFolder
from lolcats.sweep import Sweep, SweepMeasurement, SweepRun, load_sweep, run_sweep
from lolcats.sweep import jobs as jobs_module
from lolcats.sweep.job import Job
from lolcats.sweep.runner import hold_folder
from lolcats.training import Reporter

RANKS = {"grid": {"finetune.rank": [2, 3]}}


def folder_of(run: SweepRun) -> RunFolder:
    return RunFolder.of(run.config)


def comparable(run: SweepRun) -> dict[str, Any]:
    """Results without what the clock says."""
    return folder_of(run).results().model_dump(exclude={"seconds", "tokens_per_second", "date"})


def weights(run: SweepRun) -> bytes:
    return (folder_of(run).model / "model.safetensors").read_bytes()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(stage, step) of every training step that is made."""
    made: list[tuple[str, int]] = []
    original = Reporter.step

    def noting(self: Reporter, bar: Any, stage: str, step: int, *args: Any, **kwargs: Any) -> None:
        made.append((stage, step))
        original(self, bar, stage, step, *args, **kwargs)

    monkeypatch.setattr(Reporter, "step", noting)
    return made


@pytest.mark.slow
def test_shared_stage_one_gives_the_same_results(sweep_file: Callable[..., Path], calls: list[tuple[str, int]]) -> None:
    """The runs of a rank study, with and without sharing: equal numbers and equal weights."""
    runs = [{"name": "a"}, {"name": "b", "finetune.rank": 3}, {"name": "c", "finetune.train_feature_maps": True}]
    file = sweep_file(runs=runs)
    shared, alone = load_sweep(file, ["name=shared"]), load_sweep(file, ["name=alone"])
    run_sweep(shared, file)
    assert [stage for stage, _ in calls].count("transfer") == 3, "one stage 1 of three steps for three runs"
    run_sweep(alone, file, share=False)
    assert [stage for stage, _ in calls].count("transfer") == 3 + 3 * 3
    for one, other in zip(shared.runs, alone.runs, strict=True):
        assert comparable(one) == comparable(other)
        assert weights(one) == weights(other)
        lines = [len(folder_of(run).metrics_file.read_text().splitlines()) for run in (one, other)]
        assert lines[0] == lines[1]
    assert [folder_of(run).origin("transfer") for run in shared.runs] == ["", "a", "a"]
    assert [folder_of(run).origin("transfer") for run in alone.runs] == [""] * 3


@pytest.mark.slow
def test_stage_one_is_not_shared_where_it_differs(
    make_sweep: Callable[..., Sweep], sweep_file: Callable[..., Path]
) -> None:
    sweep = make_sweep(runs=[{"name": "a"}, {"name": "b", "linearization.window": 8}, {"name": "c", "seed": 1}])
    run_sweep(sweep, "study.yaml")
    assert [folder_of(run).origin("transfer") for run in sweep.runs] == [""] * 3
    assert len({weights(run) for run in sweep.runs}) == 3


@pytest.mark.slow
def test_finished_runs_are_left_alone(
    make_sweep: Callable[..., Sweep], calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(**RANKS)
    first = run_sweep(sweep, "study.yaml")
    before = {p: p.read_bytes() for p in sweep.folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(loading, "load_teacher", None)  # would fail
    again = run_sweep(sweep, "study.yaml")
    assert [vars(row) for row in again.runs] == [vars(row) for row in first.runs]
    assert {p: p.read_bytes() for p in sweep.folder.rglob("*") if p.is_file()} == before
    longer = make_sweep(grid={"finetune.rank": [2, 3, 4]})
    monkeypatch.undo()
    run_sweep(longer, "study.yaml")
    assert {path: path.read_bytes() for path in before if path.parent != sweep.folder}.items() <= before.items()
    assert [row.status for row in run_sweep(longer, "study.yaml").runs] == ["finished"] * 3


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_to_the_same_end(
    sweep_file: Callable[..., Path], calls: list[tuple[str, int]]
) -> None:
    """Killed in stage 1, in stage 2, or in the second run; the work that is done again is at most one step."""
    file = sweep_file(**RANKS)
    whole = load_sweep(file, ["name=whole"])
    run_sweep(whole, file)
    needed = len(calls)
    for stage, count in (("transfer", 2), ("finetune", 2), ("finetune", 5)):
        killed = load_sweep(file, [f"name=killed-{stage}-{count}"])
        calls.clear()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Reporter, "step", killing(calls, stage, count))
            run_sweep(killed, file)
        table = run_sweep(killed, file)
        assert len(calls) == needed + 1
        assert [row.status for row in table.runs] == ["finished", "finished"]
        assert [comparable(run) for run in killed.runs] == [comparable(run) for run in whole.runs]
        assert [weights(run) for run in killed.runs] == [weights(run) for run in whole.runs]


def killing(calls: list[tuple[str, int]], stage: str, count: int) -> Callable[..., None]:
    """`Reporter.step`, after which the process is killed at one of a stage's steps."""
    original = Reporter.step

    def step(self: Reporter, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if [name for name, _ in calls].count(stage) == count:
            raise Killed

    return step


@pytest.mark.slow
def test_a_failed_run_is_noted_and_the_others_go_on(make_sweep: Callable[..., Sweep]) -> None:
    runs = [{"name": "bad", "linearization.layers": [7]}, {"name": "good"}]
    sweep = make_sweep(runs=runs)
    table = run_sweep(sweep, "study.yaml", describe=lambda error: f"said:\n  {error}")
    assert [row.status for row in table.runs] == ["failed", "finished"]
    assert table.runs[0].error.startswith("said: layers [7] cannot be linearized")
    saved = json.loads((sweep.folder / "results.json").read_text())["runs"]
    assert [row["error"] for row in saved] == [table.runs[0].error, ""]
    assert table.runs[0].error in (sweep.folder / "results.md").read_text()
    only = run_sweep(sweep, "study.yaml", only=["good"])
    assert only.runs[0].error == table.runs[0].error, "what failed before is still known"
    mended = make_sweep(runs=[{"name": "bad", "linearization.layers": [1]}, {"name": "good"}])
    assert [row.error for row in run_sweep(mended, "study.yaml", overwrite=["bad"]).runs] == ["", ""]


@pytest.mark.slow
def test_changed_settings_are_refused_unless_the_run_may_go(
    make_sweep: Callable[..., Sweep], finish: Callable[..., None], settings: dict[str, Any]
) -> None:
    sweep = make_sweep(**RANKS)
    finish(sweep)
    before = [weights(run) for run in sweep.runs]
    changed = make_sweep({"finetune": settings["finetune"] | {"lr": 2e-2}}, **RANKS)
    said = (
        r"2 of the runs in .*study were made with other settings: rank-2 \(finetune.lr: 0.01 -> 0.02\).*Overwrite them"
    )
    with pytest.raises(LolcatsError, match=said):
        run_sweep(changed, "study.yaml")
    with pytest.raises(LolcatsError, match=r"1 of the runs .* rank-3"):
        run_sweep(changed, "study.yaml", overwrite=["rank-2"])
    assert [weights(run) for run in sweep.runs] == before
    run_sweep(changed, "study.yaml", overwrite=["rank-*"])
    assert all(weights(run) != old for run, old in zip(changed.runs, before, strict=True))
    with pytest.raises(LolcatsError, match=r"rank-9: no run of study .* did you mean rank-"):
        run_sweep(changed, "study.yaml", overwrite=["rank-9"])


@pytest.mark.slow
def test_only_some_runs(make_sweep: Callable[..., Sweep]) -> None:
    sweep = make_sweep(grid={"finetune.rank": [2, 3, 4]})
    table = run_sweep(sweep, "study.yaml", only=["rank-[34]"])
    assert [row.status for row in table.runs] == ["new", "finished", "finished"]
    assert folder_of(sweep.runs[2]).origin("transfer") == "rank-3"


def test_a_folder_that_is_no_sweep_is_never_touched(make_sweep: Callable[..., Sweep]) -> None:
    sweep = make_sweep(**RANKS)
    sweep.folder.mkdir(parents=True)
    (sweep.folder / "thesis.txt").write_text("years of work")
    with pytest.raises(LolcatsError, match="is not empty and is not a sweep of lolcats"):
        run_sweep(sweep, "study.yaml")
    assert [path.name for path in sweep.folder.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_the_written_sweep_goes_on_by_itself(sweep_file: Callable[..., Path], calls: list[tuple[str, int]]) -> None:
    file = sweep_file(**RANKS)
    sweep = load_sweep(file, ["finetune.lr=2e-2", "name=x"])
    run_sweep(sweep, file, only=["rank-2"])
    written = sweep.folder / "sweep.yaml"
    written.write_text(f"# mine\n{written.read_text()}")
    run_sweep(load_sweep(written), written)
    assert written.read_text().startswith("# mine\n"), "the file that was given is not written"
    assert [stage for stage, _ in calls].count("finetune") == 6


@pytest.mark.slow
def test_other_measurements_become_columns_and_are_made_once(
    make_sweep: Callable[..., Sweep], finish: Callable[..., None]
) -> None:
    made: list[str] = []

    def size(config: Any, folder: RunFolder) -> dict[str, float | None]:
        made.append(config.name)
        return {"size.model": float((folder.model / "model.safetensors").stat().st_size), "size.nan": float("nan")}

    sweep = make_sweep(**RANKS)
    finish(sweep)
    tables = [run_sweep(sweep, "study.yaml", measurements=[SweepMeasurement("size", size)]) for _ in range(2)]
    assert made == ["rank-2", "rank-3"]
    assert tables[-1].runs[0].columns == {"size.model": float(len(weights(sweep.runs[0]))), "size.nan": None}
    assert "size.model" in (sweep.folder / "results.csv").read_text().splitlines()[0]


def test_torchrun_is_refused(make_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LolcatsError, match="several jobs"):
        run_sweep(make_sweep(**RANKS), "study.yaml")


def test_two_sweeps_do_not_work_in_one_folder(make_sweep: Callable[..., Sweep]) -> None:
    sweep = make_sweep(**RANKS)
    with hold_folder(sweep), pytest.raises(LolcatsError, match="another `lolcats sweep` works in"):
        run_sweep(sweep, "study.yaml")
    assert not sweep.folder.exists()


def test_a_job_without_memory_is_tried_again(make_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three jobs for two GPUs' worth of memory: the first try of the third fails."""
    command = [sys.executable, "-c", "import time; time.sleep(1)"]
    failing = [sys.executable, "-c", "print('error: out of memory; use smaller batches'); exit(1)"]
    started: list[str] = []
    said: list[str] = []
    ended: dict[str, str] = {}

    def start(job: Job, sweep: Sweep, slot: int, *_: Any) -> jobs_module._Process:
        started.append(job.name)
        log = sweep.folder / f"{len(started)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(failing if len(started) == 3 else command, stdout=file)
        return jobs_module._Process(job, process, slot, log, 0, 0.0)

    def note(job: Job, error: str) -> None:
        ended[job.name] = error

    monkeypatch.setattr(jobs_module, "_start", start)
    sweep = make_sweep(grid={"seed": [0, 1, 2]})
    sweep.folder.mkdir(parents=True)
    jobs_module.run_jobs(sweep, sweep.runs, 3, share=False, ended=note, say=said.append)
    names = [run.name for run in sweep.runs]
    assert started == [*names, names[2]] and set(ended) == set(names)
    assert any("tried again; 2 jobs at a time now" in text for text in said)


@pytest.mark.slow
def test_a_job_in_the_background_of_a_shell_can_be_ended(make_sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    """There SIGINT is ignored, which a process hands on to those that it starts."""
    sweep = make_sweep(grid={"seed": [0, 1], "finetune.tokens": [1_000_000]})
    file = tmp_path / "sweep.yaml"
    file.write_text(sweep.text)
    command = [sys.executable, "-m", "lolcats.cli", "sweep-job", str(file), sweep.runs[0].name]
    shell = "trap '' INT; exec " + shlex.join(command)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": ""}
    env["PYTHONUNBUFFERED"] = "1"
    process = subprocess.Popen(["sh", "-c", shell], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    while b"perplexity" not in (line := process.stdout.readline()):
        assert line, "it ended by itself"
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, rest.decode()


@pytest.mark.slow
def test_an_interruption_ends_all_processes(make_sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the first of two jobs runs."""
    started: list[subprocess.Popen[bytes]] = []
    original, choose = subprocess.Popen, jobs_module._next

    def noting(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(original(*args, **kwargs))
        return started[-1]

    def interrupted(*args: Any) -> Job | None:
        if started:
            raise KeyboardInterrupt
        return choose(*args)

    monkeypatch.setattr(subprocess, "Popen", noting)
    monkeypatch.setattr(jobs_module, "_next", interrupted)
    monkeypatch.setattr(jobs_module, "PATIENCE_SECONDS", 2.0)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(make_sweep(grid={"seed": [0, 1]}), "study.yaml", jobs=2)
    assert len(started) == 1 and started[0].returncode not in (None, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_jobs")
def test_runs_side_by_side(make_sweep: Callable[..., Sweep]) -> None:
    """The same weights as one after the other; stage 1 is waited for and shared; a failure is read from its log."""
    runs = [{"name": "a", "finetune.rank": 2}, {"name": "b", "finetune.rank": 3},
            {"name": "bad", "linearization.layers": [7]}]  # fmt: skip
    beside, after = make_sweep(name="beside", runs=runs), make_sweep(name="after", runs=runs)
    table = run_sweep(beside, "study.yaml", jobs=2)
    run_sweep(after, "study.yaml")
    assert [row.status for row in table.runs] == ["finished", "finished", "failed"]
    assert table.runs[2].error.startswith("layers [7] cannot be linearized")
    assert folder_of(beside.runs[1]).origin("transfer") == "a"
    for one, other in zip(beside.runs[:2], after.runs[:2], strict=True):
        assert comparable(one) == comparable(other) and weights(one) == weights(other)
    logs = sorted(path.name for path in (beside.folder / "logs").iterdir() if not path.name.startswith("."))
    assert logs == ["a.log", "b.log", "bad.log", "sweep.yaml"]
