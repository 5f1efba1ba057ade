"""`lolcats select-layers`: a table, a line of settings, and a file that `linearize` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lolcats import load_config

from .conftest import Run


@pytest.mark.slow
@pytest.mark.parametrize("score", ["kl", "kl-rest", "halo"])
def test_the_proposal_is_a_recipe(cli: Run, place: Path, score: str) -> None:
    amount = ["--length", "256", "--segments", "1", "--questions", "1", "--sources", place / "text.txt"]
    answer = cli(
        "select-layers", place / "teacher", *amount, "--score", score, "--output", "mine.yaml", "data.epochs=1"
    )
    assert answer.code != 0, "an unknown key of the configuration"
    answer = cli("select-layers", place / "teacher", *amount, "--score", score, "--output", "mine.yaml", "seed=3")
    assert answer.code == 0, answer.err
    config = load_config("mine.yaml")
    assert config.model == str(place / "teacher") and config.seed == 3
    assert config.linearization.layers in ([0], [1]) and f"layers: {config.linearization.layers}" in answer.out
    assert answer.out.count("yes") == 1 and "lolcats linearize mine.yaml" in answer.out


def test_what_is_not_known_is_refused(cli: Run, place: Path) -> None:
    cli("select-layers", "x", "--score", "gradient").refused("--score gradient: expected kl, kl-rest, halo")
    cli("select-layers", "x", "--replace", "nothing").refused("--replace nothing: expected window, layer")
    cli("select-layers", "x", "--output", "y.txt").refused("--output y.txt: expected the name of a .yaml file")
