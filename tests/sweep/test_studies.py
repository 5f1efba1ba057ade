"""Several sweep files as one: every distinct run once, and a table for each study."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lolcats.config.strict_yaml import write_yaml
from lolcats.errors import ConfigError
from lolcats.sweep import Sweep, gather, load_sweep
from lolcats.sweep.results import to_markdown
from lolcats.sweep.studies import what_it_is

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.slow
def test_every_run_is_done_once() -> None:
    joint = load_sweep(CONFIGS / "studies.yaml", ["runs_dir=out", "finetune.clip=0.5"])
    known = {run.name: what_it_is(run.config) for run in joint.runs}
    assert len({json.dumps(what, sort_keys=True) for what in known.values()}) == len(known)
    files = sorted(path for path in (CONFIGS / "studies").glob("*.yaml") if path.stem != "data_files")
    assert [path.stem for path in files] == sorted(load_sweep(path).name.replace("-", "_") for path in files)
    assert len(joint.studies) == len(files) and sum(map(len, joint.studies.values())) > len(known)
    for path in files:
        alone = load_sweep(path, ["finetune.clip=0.5"])
        for run in alone.runs:
            assert known[joint.studies[alone.name][run.name]] == what_it_is(run.config)
    where = joint.studies
    assert where["window"]["window-64"] == where["lora-rank"]["r8"] == where["components"]["hedgehog-both"]
    assert joint.measure.controls == ["window_only"] and "mmlu" in joint.measure.tasks
    assert joint.folder == Path("out/studies")


@pytest.fixture
def joint(sweep_file: Callable[..., Path], tmp_path: Path) -> Path:
    """Two studies that have a run in common."""
    for name, ranks in (("one", [2, 3]), ("two", [3, 4])):
        sweep_file(name=name, grid={"finetune.rank": ranks}).rename(tmp_path / f"{name}.yaml")
    (tmp_path / "all.yaml").write_text(write_yaml({"name": "all", "base": None, "studies": ["one.yaml", "two.yaml"]}))
    return tmp_path / "all.yaml"


def test_the_written_sweep_knows_its_studies(joint: Path, tmp_path: Path) -> None:
    sweep = load_sweep(joint, ["seed=5"])
    assert [run.name for run in sweep.runs] == ["one_rank-2", "one_rank-3", "two_rank-4"]
    assert {run.config.seed for run in sweep.runs} == {5}
    assert sweep.studies["two"] == {"rank-3": "one_rank-3", "rank-4": "two_rank-4"}
    (tmp_path / "again.yaml").write_text(sweep.text)
    again = load_sweep(tmp_path / "again.yaml")
    assert again.runs == sweep.runs and again.studies == sweep.studies and again.text == sweep.text


def test_a_table_for_each_study(joint: Path) -> None:
    sweep: Sweep = load_sweep(joint)
    lines = to_markdown(gather(sweep, {})).splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# all", "## one", "## two"]
    assert lines[lines.index("## two") + 4 :][:2] == ["| rank-3 | new |", "| rank-4 | new |"]


@pytest.mark.parametrize("studies", [[], "one.yaml", [3]], ids=str)
def test_what_is_no_list_of_files(joint: Path, studies: object) -> None:
    joint.write_text(write_yaml({"base": None, "studies": studies}))
    with pytest.raises(ConfigError, match="studies: expected a list of sweep files"):
        load_sweep(joint)
