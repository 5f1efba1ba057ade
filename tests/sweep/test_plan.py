"""The cost of a sweep before it runs, and the studies that ship."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lolcats import load_config
from lolcats.data import check_sources
from lolcats.errors import DataError
from lolcats.planning import choose_machine
from lolcats.runs.folder import RunFolder
from lolcats.sweep import Speed, Sweep, calibrate, load_sweep, make_plan, run_sweep

STUDIES = sorted((Path(__file__).parents[2] / "configs" / "studies").glob("*.yaml"))
WIKITEXT = "hf:Salesforce/wikitext:wikitext-2-raw-v1:validation"
SPEED = Speed(100.0, 50.0, "given")


def test_steps_tokens_and_time(make_sweep: Callable[..., Sweep]) -> None:
    runs = [{"name": "both"}, {"name": "rank", "finetune.rank": 4}, {"name": "no", "transfer.enabled": False}]
    plan = make_plan(make_sweep(runs=runs), speed=SPEED)
    assert [run.steps for run in plan.runs] == [
        {"transfer": 3, "finetune": 3}, {"transfer": 0, "finetune": 3}, {"transfer": 0, "finetune": 3}
    ]  # fmt: skip
    assert [run.shares for run in plan.runs] == ["", "both", ""]
    assert (plan.tokens("transfer"), plan.tokens("finetune")) == (288, 3 * 288)
    assert plan.seconds() == pytest.approx(288 / 100 + 3 * 288 / 50)
    unshared = make_plan(make_sweep(runs=runs), speed=SPEED, share=False)
    assert unshared.tokens("transfer") == 2 * 288
    assert make_plan(make_sweep(runs=runs)).seconds() is None


@pytest.mark.slow
def test_what_is_done_costs_nothing_and_gives_the_speed(
    make_sweep: Callable[..., Sweep], finish: Callable[..., None]
) -> None:
    sweep = make_sweep(grid={"finetune.rank": [2, 3], "seed": [0, 1]})
    done = [run for run in sweep.runs if run.name != "rank-3_seed-0"]
    finish(sweep, *done)
    for run, factor in zip(done, (3.0, 1.0, 2.0), strict=True):
        results = run.folder.results()
        results.tokens_per_second["finetune"] *= factor
        run.folder.write_results(results)
    plan = make_plan(sweep)
    assert [run.status for run in plan.runs] == ["finished", "finished", "new", "finished"]
    assert (plan.tokens("transfer"), plan.tokens("finetune")) == (0, 288)
    assert plan.speed is not None and plan.speed.source == "measured in 3 finished runs"
    speeds = sorted(run.folder.results().tokens_per_second["finetune"] for run in done)
    assert len(set(speeds)) == 3
    assert plan.speed.finetune == speeds[1]
    other = plan.speed.other_seconds
    assert other is not None and other > 0
    assert plan.seconds() == pytest.approx(288 / speeds[1] + other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"finetune.method": "full"}, {"finetune.train_feature_maps": True}, {"linearization.layers": [1]},
     {"transfer.enabled": False, "finetune.targets": ["q_proj"]}, {"dtype": "bfloat16", "finetune.rank": 8}],
    ids=str,
)  # fmt: skip
def test_disk_is_what_a_run_leaves(make_sweep: Callable[..., Sweep], changes: dict[str, Any]) -> None:
    sweep = make_sweep(runs=[{"name": "a", **changes}])
    expected = make_plan(sweep).bytes()
    table = run_sweep(sweep, "study.yaml")
    assert table.runs[0].status == "finished", table.runs[0].error
    files = list(RunFolder.of(sweep.runs[0].config).path.rglob("*.safetensors"))
    # Names of tensors, step counters and random states are a few kilobytes, whatever the model.
    tensors = [(name, tensor) for file in files for name, tensor in load_file(file).items()]
    kept = [t for name, t in tensors if not name.startswith(("random:", "optimizer:step:"))]
    assert sum(t.numel() * t.itemsize for t in kept) == expected


def test_time_is_computed_where_nothing_was_measured(make_sweep: Callable[..., Sweep]) -> None:
    """By the numbers of `lolcats plan`; a speed that is given or was measured is taken instead."""
    sweep = make_sweep(runs=[{"name": "both"}, {"name": "no", "transfer.enabled": False}])
    machine = choose_machine("h100")
    plan = make_plan(sweep, machine=machine)
    both, alone = (run.seconds for run in plan.runs)
    assert both is not None and alone is not None and both > alone > 0
    assert plan.machine == machine and plan.seconds() == both + alone
    known = make_plan(sweep, speed=SPEED, machine=machine)
    assert known.machine is None and known.runs[1].seconds == 288 / 50


def test_a_run_that_would_fail_is_named(make_sweep: Callable[..., Sweep]) -> None:
    plan = make_plan(make_sweep(grid={"linearization.layers": [[0], [7]]}))
    assert plan.runs[0].problem == "" and "layers [7] cannot be linearized" in plan.runs[1].problem


def test_a_model_that_is_not_here(make_sweep: Callable[..., Sweep]) -> None:
    plan = make_plan(make_sweep({"model": "/nowhere/at/all"}, grid={"seed": [1]}))
    assert plan.bytes() is None and plan.tokens("finetune") == 288


@pytest.mark.slow
def test_calibration_leaves_nothing_behind(make_sweep: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = make_sweep(grid={"transfer.enabled": [False, True]})
    before = set(tmp_path.rglob("*"))
    speed = calibrate(sweep.runs)
    assert speed.transfer > 0 and speed.finetune > 0 and speed.source == "measured in a few steps of enabled-True"
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_studies_load_and_can_be_planned(file: Path, model_folder: Path) -> None:
    """With the tiny teacher, whose layers have the names of those of SmolLM2."""
    settings = [f"model={model_folder}", f"runs_dir={model_folder / 'none'}"]
    if file.stem not in ("components", "paper_methods"):
        settings.append("linearization.feature_size=3")
    plan = make_plan(load_sweep(file, settings), speed=SPEED)
    assert len(plan.runs) >= 3
    assert not [run.problem for run in plan.runs if run.problem]
    assert plan.tokens("finetune") > 0 and (plan.bytes() or 0) > 0


@pytest.mark.slow
def test_studies_are_those_of_the_paper() -> None:
    values = {file.stem: load_sweep(file) for file in STUDIES}
    assert set(values) == {
        "components", "data", "data_files", "lora_projections", "lora_rank", "paper_methods", "seeds", "softmax_layers",
        "tokens", "transfer_steps", "window",
    }  # fmt: skip
    layers = {run.name: run.config for run in values["components"].runs}
    assert len(layers) == 8
    for name, config in layers.items():
        assert config.linearization.feature_map == name.split("-")[0]
        assert (config.linearization.window == 0) == name.endswith(("swap", "-transfer"))
        assert config.transfer.enabled == name.endswith(("-transfer", "both"))
    ranks = [(run.config.finetune.rank, run.config.finetune.method) for run in values["lora_rank"].runs]
    assert ranks[:-1] == [(rank, "lora") for rank in (4, 8, 16, 32, 64, 128, 256)] and ranks[-1][1] == "full"
    assert [run.config.linearization.window for run in values["window"].runs] == [4, 16, 64, 256]
    assert {run.config.seed for run in values["seeds"].runs} == {0, 1, 2}
    t2r, hedgehog, lolcats, hybrid = (run.config for run in values["paper_methods"].runs)
    assert not t2r.transfer.enabled and t2r.linearization.window == hedgehog.linearization.window == 0
    assert (hedgehog.transfer.mse_factor, hedgehog.transfer.xent_factor) == (0, 1)
    assert lolcats.linearization == load_config("paper").linearization and lolcats.transfer.mse_factor == 1000
    recipe = load_config("hybrid")
    assert hybrid.linearization == recipe.linearization
    own = {"tokens", "batch_size", "compile"}
    for stage in ("transfer", "finetune"):
        assert getattr(hybrid, stage).model_dump(exclude=own) == getattr(recipe, stage).model_dump(exclude=own)
    for sweep in values.values():
        assert {tuple(run.config.evaluation.sources) for run in sweep.runs} == {(WIKITEXT,)}
        assert sweep.measure.tasks[:5] == ["piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande"]


@pytest.mark.slow
def test_a_study_reads_its_evaluation_text_from_a_copy(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """One override for all runs, which is not refused as a stray: no source of the training is called so."""
    changes = [
        f"model={model_folder}", f"runs_dir={tmp_path}", f"data.sources=[{text_file}]", "device=cpu",
        f"data.local.Salesforce/wikitext={text_file}", "data.sequence_length=24", "transfer.tokens=96",
        "finetune.tokens=96", "evaluation.max_segments=2", "measure=null", "linearization.window=4",
        "linearization.window_kind=sliding", "linearization.feature_size=3",
    ]  # fmt: skip
    file = next(file for file in STUDIES if file.stem == "lora_rank")
    table = run_sweep(load_sweep(file, changes), file, only=["r4"])
    row = next(row for row in table.runs if row.name == "r4")
    assert row.status == "finished", row.error
    with pytest.raises(DataError, match=r"data\.local names Salesforce/wikitext, which no source uses"):
        check_sources(load_config("paper", ["data.local.Salesforce/wikitext=x.txt", "data.sources=[python-docs]"]).data)
