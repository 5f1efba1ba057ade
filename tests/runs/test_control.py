"""The trained window: the student's stage 2 on a plain window of the student's memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lolcats import RunConfig, linearize
from lolcats.evaluation import compare
from lolcats.evaluation.compare import load_variants
from lolcats.evaluation.trained_window import TENSORS, window_folder
from lolcats.runs import control, steps
from lolcats.runs.results import Results
from lolcats.training.checkpoint import read_metadata

ASKED = "evaluation.controls=[equal_window,trained_window]"
CLOCK = {"seconds", "tokens_per_second", "date", "measured_with"}
STUDENTS = {"transfer", "student", "teacher", "equal_window"}


def without_control(results: Results) -> dict[str, object]:
    """What results say of all but the trained window."""
    content = results.model_dump(exclude=CLOCK)
    for section in ("perplexity", "kl", "by_position"):
        content[section] = {name: value for name, value in content[section].items() if name in STUDENTS}
    for section in ("tokens", "best"):
        content[section].pop("trained_window", None)
    return content


@pytest.mark.slow
@pytest.mark.parametrize("more", [["finetune.merge=true"], ["finetune.train_feature_maps=true"]])
def test_the_student_is_the_same_with_its_control(make_config: Callable[..., RunConfig], more: list[str]) -> None:
    plain = linearize(make_config("name=plain", "evaluation.controls=[equal_window]", *more))
    folder = linearize(make_config("name=both", ASKED, *more))
    results = folder.results()
    assert results.complete and not results.notes
    assert results.tokens["trained_window"] == results.tokens["finetune"] == 480
    assert results.seconds["trained_window"] > 0
    assert without_control(results) == without_control(plain.results())
    assert (folder.model / "model.safetensors").read_bytes() == (plain.model / "model.safetensors").read_bytes()
    assert window_folder(folder.model).is_dir() and not window_folder(plain.model).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["finetune.targets=all"],
        ["finetune.method=full"],
        ["finetune.method=full", "finetune.kl_factor=0"],
        ["linearization.mixer=blend", "linearization.bits=8", "finetune.train_feature_maps=true"],
    ],
)
def test_it_is_loaded_as_it_was_trained(make_config: Callable[..., RunConfig], more: list[str]) -> None:
    mixer = [] if "linearization.mixer=blend" in more else ["linearization.start=paper"]
    folder = linearize(make_config(ASKED, *mixer, *more))
    measured = folder.results()
    assert not measured.notes
    assert measured.perplexity["trained_window"] < measured.perplexity["equal_window"]  # type: ignore[operator]
    config = folder.config()
    found = compare(folder.model, teacher=config.model, held_out=config, length=24, controls=["trained_window"])
    assert found["trained_window"].perplexity == pytest.approx(measured.perplexity["trained_window"], rel=1e-4)
    assert found["trained_window"].kl == pytest.approx(measured.kl["trained_window"], rel=1e-2)
    assert found["teacher"].perplexity == pytest.approx(measured.perplexity["teacher"], rel=1e-5)


@pytest.mark.slow
def test_it_learns_as_the_student_does_where_both_are_windows(make_config: Callable[..., RunConfig]) -> None:
    """A blend without pairs and far half is a plain window: then student and control are the same, to the last bit."""
    layer = ["linearization.mixer=blend", "linearization.kept.pairs=0", "linearization.far=none"]
    sizes = ["linearization.window=6", "linearization.sinks=4", "linearization.start=plain", "transfer.enabled=false"]
    folder = linearize(make_config(*layer, *sizes, ASKED))
    results = folder.results()
    assert results.perplexity["trained_window"] == pytest.approx(results.perplexity["student"], rel=1e-6)
    checkpoints = [load_file(folder.checkpoints(s) / "best.safetensors") for s in ("finetune", "trained_window")]
    assert checkpoints[0].keys() == checkpoints[1].keys()
    assert all(torch.equal(checkpoints[0][name], tensor) for name, tensor in checkpoints[1].items())


@pytest.mark.slow
def test_its_step_by_itself_and_interrupted(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = linearize(make_config("name=whole", ASKED))
    folder = linearize(make_config("name=steps", ASKED), until="save")
    assert steps.finished(folder) == ["prepare", "transfer", "finetune", "save"]
    assert "trained_window" not in folder.results().perplexity

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(control, "save_window", killed)
        with pytest.raises(KeyboardInterrupt):
            steps.control(folder)
    assert "control" not in steps.finished(folder)
    last = folder.checkpoints("trained_window") / "last.safetensors"
    assert read_metadata(last)["step"] == 5
    before = last.stat().st_mtime_ns
    steps.control(folder)
    assert last.stat().st_mtime_ns == before, "what is trained is not trained again"
    assert steps.finished(folder)[-1] == "control"
    steps.measure(folder)
    assert folder.results().model_dump(exclude=CLOCK) == whole.results().model_dump(exclude=CLOCK)
    adapters = [window_folder(run.model) / "adapter_model.safetensors" for run in (folder, whole)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    AutoModelForCausalLM.from_pretrained(folder.model)


@pytest.mark.slow
def test_a_control_that_fails_is_a_note(make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(control, "train_stage", broken)
        folder = linearize(make_config(ASKED))
    results = folder.results()
    assert results.complete and results.notes[control.FAILED] == "RuntimeError: out of memory"
    assert "trained_window" not in results.perplexity and math.isfinite(results.perplexity["student"] or math.nan)
    variants = load_variants(folder.model, teacher=folder.config().model, controls=["trained_window"]).variants
    assert set(variants) == {"teacher", "student"}


@pytest.mark.slow
def test_a_damaged_one_is_told_in_a_line(make_config: Callable[..., RunConfig]) -> None:
    from lolcats import LolcatsError

    folder = linearize(make_config(ASKED, "finetune.method=full"))
    (window_folder(folder.model) / TENSORS).write_bytes(b"no tensors")
    with pytest.raises(LolcatsError, match=r"cannot use the trained window in .*delete it to go on without"):
        load_variants(folder.model, teacher=folder.config().model, controls=["trained_window"])
