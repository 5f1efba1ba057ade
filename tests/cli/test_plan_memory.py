"""`lolcats plan-memory`, in this process."""

from pathlib import Path

import pytest

from lolcats.config import load_config

from .conftest import TINY, Run

SMALL = [
    *TINY,
    "linearization.mixer=blend",
    "linearization.far=none",
    "linearization.window=6",
    "linearization.kept.pairs=4",
]


@pytest.mark.slow
def test_a_plan_is_a_recipe(cli: Run, place: Path) -> None:
    """Its file gives a run whose model has the sizes of the plan."""
    words = ["plan-memory", place / "teacher", f"data.sources=['{place / 'text.txt'}']", *SMALL]
    answer = cli(*words, "linearization.budget=layers", "--output", "plan.yaml")
    assert answer.code == 0, answer.err
    split = load_config("plan.yaml").linearization.model_dump()["split"]
    lines = [line.split() for line in answer.out.splitlines()]
    assert [line[1:3] for line in lines if line[:1] in (["0"], ["1"])] == [list(map(str, sizes)) for sizes in split]
    assert any(line[:1] == ["all"] and line[-1] == "100.0%" for line in lines)
    cli("plan-memory", "plan.yaml").refused("nothing to share")
    assert cli("linearize", "plan.yaml", "name=planned").code == 0
    shown = cli("inspect", "runs/planned").out
    assert f"window of {min(w for w, _ in split)}" in shown
    heads = cli(*words)
    assert heads.code == 0 and len(heads.out.splitlines()[-2].split()) == 7, heads.out


def test_what_a_plan_refuses(cli: Run, place: Path) -> None:
    teacher = place / "teacher"
    cli("plan-memory", teacher, "--output", "plan.txt").refused("ends in .yaml")
    cli("plan-memory", teacher, "--output", "gone/plan.yaml").refused("no folder gone")
    cli("plan-memory", teacher, "linearization.mixer=hybrid", *TINY).refused("nothing to share", "hybrid")
    cli("plan-memory", teacher, "linearization.windw=3").refused("windw")
