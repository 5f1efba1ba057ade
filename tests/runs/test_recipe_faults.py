"""Runs to which something happens: what fails for show, settings and files that change between two calls, two processes
on one run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from killing import Killed
from lolcats import LolcatsError, RunConfig, linearize
from lolcats.config import dump_config
from lolcats.runs import parts, recipe
from lolcats.runs.folder import RunFolder
from lolcats.runs.results import read_results
from lolcats.training import Reporter
from lolcats.training.checkpoint import read_metadata

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that were made once and are copied by those who need them."""
    return {"folder": tmp_path_factory.mktemp("runs")}


@pytest.fixture
def stopped(make_config: Make, runs: dict[str, Path]) -> RunFolder:
    """A run that was killed in step 3 of stage 2, after the checkpoint of step 2."""
    if "stopped" not in runs:
        config = make_config(f"runs_dir={runs['folder']}", "name=stopped")
        step = Reporter.step

        def killing(self: Reporter, bar: Any, stage: str, now: int, *args: Any, **kwargs: Any) -> None:
            step(self, bar, stage, now, *args, **kwargs)
            if (stage, now) == ("finetune", 3):
                raise Killed

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Reporter, "step", killing)
            linearize(config)
        runs["stopped"] = runs["folder"] / "stopped"
    return copied(runs["stopped"], make_config())


@pytest.fixture
def finished(make_config: Make, runs: dict[str, Path]) -> RunFolder:
    """A whole run."""
    if "finished" not in runs:
        linearize(make_config(f"runs_dir={runs['folder']}", "name=finished"))
        runs["finished"] = runs["folder"] / "finished"
    return copied(runs["finished"], make_config())


def copied(source: Path, config: RunConfig) -> RunFolder:
    folder = RunFolder.of(config)
    shutil.copytree(source, folder.path)
    folder.config_file.write_text(dump_config(config))
    return folder


def edit(file: Path, **sections: dict[str, Any]) -> None:
    """Change settings in a config.yaml."""
    settings = yaml.safe_load(file.read_text())
    for name, values in sections.items():
        settings[name] |= values
    file.write_text(yaml.safe_dump(settings))


def resumed(make_config: Make, *overrides: str) -> RunFolder:
    return linearize(make_config(*overrides), resume=True)


# ---- what is only shown or measured


@pytest.mark.slow
def test_a_failure_for_show_is_a_note(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = parts.measure

    def some(variants: Any, *args: Any, **kwargs: Any) -> Any:
        if {"transfer", "no_attention", "training_free"} & set(variants):
            raise ZeroDivisionError("of a control")
        return real(variants, *args, **kwargs)

    monkeypatch.setattr(recipe, "sample", lambda *_: [][0])
    monkeypatch.setattr(parts, "measure", some)
    folder = linearize(make_config())
    results = folder.results()
    assert results.complete is True and folder.has_model()
    assert set(results.perplexity) == {"teacher", "equal_window", "student", "window_only", "linear_only"}
    assert results.notes["measurement of no_attention"] == "ZeroDivisionError: of a control"
    assert {"sample of the student", "sample of the teacher", "measurement of transfer"} <= set(results.notes)
    assert read_results(folder.model / "lolcats_results.json") == results


@pytest.mark.slow
def test_the_model_is_saved_before_it_is_measured(
    make_config: Make, stopped: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(*_: Any, **__: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(parts, "measure", dying)
        resumed(make_config)
    saved = (stopped.model / "model.safetensors").read_bytes()
    assert stopped.has_model() and not stopped.results().complete
    assert resumed(make_config).results().complete
    assert (stopped.model / "model.safetensors").read_bytes() == saved


def test_a_teacher_without_a_finite_loss_is_refused_at_once(make_config: Make, model_folder: Path) -> None:
    place = Path(make_config().runs_dir).parent / "teacher"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)  # finite itself
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(place)
    with pytest.raises(LolcatsError, match=r"expected a model with finite weights$") as refused:
        linearize(make_config(f"model={place}"))
    assert "learning rate" not in str(refused.value)
    assert not RunFolder.of(make_config()).metrics_file.exists()


@pytest.mark.parametrize("override", ["finetune.targets=[nope]", "finetune.rank=60000", "linearization.layers=[7]"])
def test_stage_two_is_checked_before_stage_one(make_config: Make, override: str) -> None:
    with pytest.raises(LolcatsError, match=r"nope|60000|\[7\]"):
        linearize(make_config(override))
    assert not RunFolder.of(make_config()).metrics_file.exists()


# ---- settings that change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"linearization": {"window": 5}}, "linearization.window 6 -> 5"),
        ({"finetune": {"rank": 4}}, "finetune.rank 8 -> 4"),
        ({"transfer": {"lr": 0.5}}, "transfer.lr 0.01 -> 0.5"),
        ({"transfer": {"enabled": False}}, "transfer.enabled True -> False"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["file", "command"])
def test_settings_that_were_trained_with_cannot_change(
    make_config: Make, stopped: RunFolder, change: dict[str, Any], told: str, place: str
) -> None:
    overrides = [f"{name}.{key}={value}" for name, values in change.items() for key, value in values.items()]
    if place == "file":
        edit(stopped.config_file, **change)
    before = stopped.config_file.read_bytes()
    with pytest.raises(LolcatsError, match=f"other settings.*{told}"):
        resumed(make_config, *(word.lower() if "enabled" in word else word for word in overrides))
    assert stopped.config_file.read_bytes() == before


@pytest.mark.slow
def test_a_lower_learning_rate_and_other_free_settings_go_on(make_config: Make, stopped: RunFolder) -> None:
    folder = resumed(make_config, "finetune.lr=1e-4", "finetune.micro_batch_size=2", "evaluation.max_segments=2")
    results = folder.results()
    assert results.changes == {"finetune": ["after step 2: finetune.lr 0.01 -> 0.0001"]}
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    rates = [line["lr"] for line in lines if line["stage"] == "finetune" and "lr" in line]
    assert len(rates) == 5 and min(rates[:2]) > 1e-3 and max(rates[2:]) <= 1e-4
    assert results.evaluation.segments == 2 and "teacher" in results.perplexity  # measured anew
    assert yaml.safe_load(folder.config_file.read_text())["finetune"]["lr"] == 1e-4
    with pytest.raises(LolcatsError, match=r"evaluation\.max_segments 2 -> none"):
        resumed(make_config, "finetune.lr=1e-4")
    assert resumed(make_config, "finetune.lr=1e-4", "evaluation.max_segments=2", "device=auto").results() == results


@pytest.mark.slow
def test_a_stage_to_come_may_be_another(make_config: Make, stopped: RunFolder) -> None:
    shutil.rmtree(stopped.checkpoints("finetune"))
    folder = resumed(make_config, "finetune.rank=2", "finetune.tokens=96")
    assert read_metadata(folder.checkpoints("finetune") / "last.safetensors")["steps"] == 1


@pytest.mark.slow
def test_other_text_or_weights_under_the_same_name_are_refused(
    make_config: Make, text_file: Path, model_folder: Path, finished: RunFolder
) -> None:
    shutil.rmtree(finished.model)
    text = text_file.read_text()
    weights = model_folder / "model.safetensors"
    before = weights.read_bytes()
    try:
        text_file.write_text(text.replace("miller", "killer"))
        with pytest.raises(LolcatsError, match=r"last\.safetensors belongs to something else: the text"):
            resumed(make_config)
        text_file.write_text(text)
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.down_proj.weight"] *= 1.5
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(LolcatsError, match=r"belongs to something else: the weights that the stage began with"):
            resumed(make_config)
    finally:
        text_file.write_text(text)
        weights.write_bytes(before)


def test_settings_of_other_versions(make_config: Make, finished: RunFolder) -> None:
    settings = yaml.safe_load(finished.config_file.read_text())
    del settings["quantization"], settings["finetune"]["clip"]  # an earlier version did not have them
    settings["linearization"]["of_a_later_version"] = 3
    text = "# mine\n" + yaml.safe_dump(settings)
    finished.config_file.write_text(text)
    assert resumed(make_config).results().complete
    assert finished.config_file.read_text() == text
    assert finished.unknown_settings() == ["linearization.of_a_later_version"]


# ---- files


@pytest.mark.slow
def test_a_model_that_is_gone_is_made_again(make_config: Make, finished: RunFolder) -> None:
    model = finished.model / "model.safetensors"
    before, kept = model.read_bytes(), finished.results()
    model.write_bytes(before[:1000])
    results = resumed(make_config).results()
    assert model.read_bytes() == before
    assert results.model_dump(exclude={"seconds"}) == kept.model_dump(exclude={"seconds"})


@pytest.mark.parametrize(
    "content", [b"", b'{"perplexity": {"teac', b"null", b"[1]", b"\0" * 40, b"\xff\xfe{}", b'{"kl": 3}',
                b'{"perplexity": {"teacher": "x"}}', b"[" * 10_000], ids=lambda c: repr(c[:12]),
)  # fmt: skip
def test_broken_results_are_named(make_config: Make, stopped: RunFolder, content: bytes) -> None:
    stopped.results_file.write_bytes(content)
    with pytest.raises(LolcatsError, match=r"results\.json cannot be used: .*; delete it and resume"):
        resumed(make_config)


@pytest.mark.slow
def test_results_that_were_deleted_are_measured_again(make_config: Make, stopped: RunFolder) -> None:
    stopped.results_file.unlink()
    results = resumed(make_config).results()
    assert {"teacher", "training_free", "transfer", "student"} <= set(results.perplexity)
    assert results.tokens == {"transfer": 480, "finetune": 480}


@pytest.mark.slow
def test_stage_one_is_not_silently_trained_again(make_config: Make, stopped: RunFolder) -> None:
    (stopped.checkpoints("transfer") / "last.safetensors").unlink()
    with pytest.raises(LolcatsError, match=r"transfer.last\.safetensors is missing, though stage 2 has begun"):
        resumed(make_config)
    shutil.rmtree(stopped.path / "checkpoints")  # as it says
    assert resumed(make_config).results().complete


# ---- two processes, links, leftovers


@pytest.mark.parametrize("option", ["new", "resume", "overwrite"])
def test_a_run_at_work_is_left_alone(make_config: Make, stopped: RunFolder, option: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in stopped.path.rglob("*") if path.name != ".lock"}
    with stopped.held(), pytest.raises(LolcatsError, match="another process works on the run"):
        linearize(make_config(), resume=option == "resume", overwrite=option == "overwrite")
    assert {path: path.stat().st_mtime_ns for path in stopped.path.rglob("*") if path.name != ".lock"} == before


@pytest.mark.slow
def test_a_linked_run_is_emptied_not_replaced(make_config: Make, stopped: RunFolder, tmp_path: Path) -> None:
    elsewhere = tmp_path / "big-disk"
    stopped.path.rename(elsewhere)
    stopped.path.symlink_to(elsewhere)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("kept")
    (elsewhere / "link").symlink_to(outside)
    linearize(make_config("transfer.enabled=false", "finetune.enabled=false"), overwrite=True)
    assert stopped.path.is_symlink() and stopped.has_model()
    assert not (elsewhere / "checkpoints").exists() and not (elsewhere / "link").exists()
    assert (outside / "mine").read_text() == "kept"


def test_leftovers_of_killed_processes_are_removed(make_config: Make, stopped: RunFolder) -> None:
    from lolcats.files import _HOST

    for place in (stopped.path, stopped.checkpoints("finetune")):
        (place / f".model.{_HOST}-99999999.tmp").mkdir()
    stopped.prepare(make_config(), resume=True)
    assert not list(stopped.path.rglob("*.tmp"))


def test_a_finished_run_is_not_written_to(make_config: Make, finished: RunFolder) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")}
    resumed(make_config, "device=auto")
    assert {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")} == before
