"""The steps of a run one by one: to the same bytes, and none before those that it goes on with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lolcats import LolcatsError, RunConfig, linearize
from lolcats.runs import recipe, steps
from lolcats.runs.folder import RunFolder
from lolcats.runs.results import Results

CLOCK = {"seconds", "tokens_per_second", "date"}


@pytest.mark.slow
def test_steps_one_by_one_are_the_whole_run(make_config: Callable[..., RunConfig]) -> None:
    whole = linearize(make_config("name=whole"))
    folder = steps.prepare(make_config("name=steps"))
    assert steps.finished(folder) == ["prepare"] and "teacher" in folder.results().perplexity
    for number, step in ((2, steps.transfer), (3, steps.finetune), (5, steps.save), (6, steps.measure)):
        assert not folder.has_model() or number == 6
        assert step(folder.path).path == folder.path
        assert len(steps.finished(folder)) == number, "the control, which was not asked for, is done with the model"
    assert folder.results().model_dump(exclude=CLOCK) == whole.results().model_dump(exclude=CLOCK)
    assert (folder.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    steps.transfer(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before, (
        "what is done is not done again"
    )


def test_there_may_be_nothing_to_do_in_stage_1(make_config: Callable[..., RunConfig]) -> None:
    words = ("name=plain", "linearization={mixer: blend, far: none, window: 4}", "finetune.enabled=false")
    folder = steps.prepare(make_config(*words))
    steps.transfer(folder)
    assert steps.finished(folder) == ["prepare", "transfer", "finetune"]
    steps.save(folder)
    assert folder.has_model()


@pytest.mark.slow
def test_a_step_needs_those_before_it(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(LolcatsError, match=r"is no run: expected config\.yaml"):
        steps.transfer(tmp_path)
    config = make_config("finetune.enabled=false")
    folder = RunFolder.of(config)
    folder.prepare(config)
    with pytest.raises(LolcatsError, match=r"the step prepare has not been done yet, which save goes on with"):
        steps.save(folder)
    linearize(config, resume=True, until="transfer")
    assert steps.finished(folder) == ["prepare", "transfer", "finetune"] and not folder.results().complete
    with pytest.raises(LolcatsError, match=r"the step save has not been done yet, which measure goes on with"):
        steps.measure(folder)
    assert linearize(config, resume=True).results().complete


def test_products_are_rounded_during_a_run_only(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a run lets products of float32 be rounded; what comes after it in the same process is exact again."""
    seen: list[str] = []

    def stop(*_: object) -> None:
        seen.append(torch.get_float32_matmul_precision())
        raise LolcatsError("stop")

    monkeypatch.setattr(recipe, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(recipe, "check_impl", lambda *_: None)
    monkeypatch.setattr(recipe, "open_run", lambda *_: Results())
    monkeypatch.setattr(recipe, "_prepare", stop)
    with pytest.raises(LolcatsError, match="stop"):
        linearize(make_config())
    assert seen == ["high"] and torch.get_float32_matmul_precision() == "highest"
