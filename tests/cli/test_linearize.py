"""`lolcats linearize`: what it prints and leaves behind, and how a run is gone on with or replaced."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import equal, zeros
from transformers import AutoModelForCausalLM

import lolcats
from lolcats.cli.linearize import read_target

from .conftest import Run


@pytest.mark.slow
def test_run_shows_the_story_and_where_the_model_is(cli: Run, arguments: list[str]) -> None:
    """The table in its order, both generations, the folder and how to load it."""
    answer = cli(*arguments, "name=a")
    assert answer.code == 0, answer.err
    rows = ["teacher (softmax)", "window + sinks", "after attention transfer", "after LoRA (student)", "sinks alone"]
    places = [answer.out.rindex(row) for row in rows]
    assert places == sorted(places)
    assert "ratio to teacher" in answer.out and "KL to teacher" in answer.out
    assert "  teacher: ..." in answer.out and "  student: ..." in answer.out
    assert "model: runs/a/model" in answer.out and "AutoModelForCausalLM.from_pretrained('runs/a/model')" in answer.out
    assert answer.err == ""
    assert len(lolcats.linearized_layers(AutoModelForCausalLM.from_pretrained("runs/a/model"))) == 2


@pytest.mark.slow
def test_yaml_file_is_a_target(cli: Run, arguments: list[str], tmp_path: Path) -> None:
    """The settings of a run, given again as a file."""
    assert cli(*arguments, "name=a", "finetune.enabled=false").code == 0
    shutil.copy(tmp_path / "runs/a/config.yaml", tmp_path / "again.yaml")
    answer = cli("linearize", "again.yaml", "name=b")
    assert answer.code == 0 and "after LoRA" not in answer.out and "student" in answer.out
    first, second = (json.loads((tmp_path / f"runs/{n}/results.json").read_text()) for n in "ab")
    assert first["perplexity"] == second["perplexity"]


@pytest.mark.slow
def test_resume_of_a_finished_run_prints_it_again(cli: Run, arguments: list[str]) -> None:
    """Nothing is trained twice."""
    assert cli(*arguments, "name=a").code == 0
    answer = cli(*arguments, "name=a", "--resume")
    assert answer.code == 0 and "after LoRA (student)" in answer.out and "tokens/s" not in answer.out


@pytest.mark.slow
def test_resume_ends_as_if_uninterrupted(
    cli: Run, arguments: list[str], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in stage 2, then --resume: the same weights as the run in one go."""
    with monkeypatch.context() as patch:
        patch.setattr(import_module("lolcats.runs.recipe"), "finetune", _interrupt)
        answer = cli(*arguments, "name=tiny")
    assert answer.code == 130 and answer.err == "interrupted; the last checkpoint is kept\n"
    assert cli(*arguments, "name=tiny", "--resume").code == 0
    one, two = (load_file(Path(run) / "model/model.safetensors") for run in (finished, "runs/tiny"))
    assert one.keys() == two.keys() and all(equal(one[name], two[name]) for name in one)


def _interrupt(run: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_overwrite_replaces_a_run(cli: Run, arguments: list[str]) -> None:
    """Other settings under the same name."""
    assert cli(*arguments, "name=a", "finetune.enabled=false").code == 0
    assert cli(*arguments, "name=a", "finetune.enabled=false", "linearization.window=4", "--overwrite").code == 0
    assert lolcats.load_config(Path("runs/a/config.yaml")).linearization.window == 4


@pytest.mark.slow
def test_existing_run_is_kept(cli: Run, arguments: list[str]) -> None:
    """Neither --resume nor --overwrite: refused; --resume with other settings too."""
    assert cli(*arguments, "name=a", "finetune.enabled=false").code == 0
    cli(*arguments, "name=a").refused("already holds a run", "--resume", "--overwrite")
    cli(*arguments, "name=a", "--resume", "seed=3").refused("other settings")


def test_folder_that_is_no_run_is_never_deleted(cli: Run, arguments: list[str], tmp_path: Path) -> None:
    """--overwrite of somebody's folder."""
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/thesis.tex").write_text("mine")
    cli(*arguments, "name=a", "--overwrite").refused("not a run")
    assert (tmp_path / "runs/a/thesis.tex").exists()


def test_resume_and_overwrite_exclude_each_other(cli: Run) -> None:
    """Both at once cannot be meant."""
    cli("linearize", "demo", "--resume", "--overwrite").refused("give one of them")


@pytest.fixture
def stopped(cli: Run, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a run that was stopped after stage 1."""
    with monkeypatch.context() as patch:
        patch.setattr(import_module("lolcats.runs.recipe"), "finetune", _interrupt)
        assert cli(*arguments, "name=a").code == 130
    return [*arguments, "name=a", "--resume"]


CHECKPOINT = Path("runs/a/checkpoints/transfer/last.safetensors")


@pytest.mark.slow
def test_truncated_checkpoint(cli: Run, stopped: list[str]) -> None:
    """Half a file."""
    CHECKPOINT.write_bytes(CHECKPOINT.read_bytes()[:500])
    cli(*stopped).refused("cannot read the checkpoint", "delete it")


@pytest.mark.slow
def test_checkpoint_of_another_program(cli: Run, stopped: list[str]) -> None:
    """A safetensors file without our metadata."""
    save_file({"weight": zeros(2)}, CHECKPOINT)
    cli(*stopped).refused("is not a checkpoint of lolcats")


@pytest.mark.slow
def test_checkpoint_of_another_run(cli: Run, stopped: list[str], arguments: list[str]) -> None:
    """A checkpoint whose tensors have other shapes."""
    options = ["name=b", "linearization.feature_size=4", "finetune.enabled=false"]
    assert cli(*arguments, *options).code == 0
    shutil.copy("runs/b/checkpoints/transfer/last.safetensors", CHECKPOINT)
    cli(*stopped).refused("made with other settings", "linearization.feature_size 4 -> none")


@pytest.mark.parametrize("target", ["recommended", "small", "recall", "hybrid", "paper"])
def test_recipe_is_a_target(target: str) -> None:
    """Recipes keep their own model; overrides are applied."""
    config = read_target(target, ["finetune.rank=3"])
    assert config.name == target and config.model == "demo" and config.finetune.rank == 3


@pytest.mark.parametrize("target", ["demo", "org/name", "./my folder", "model.gguf", "1e4", "null", "a: b"])
def test_model_is_a_target(target: str) -> None:
    """Whatever is no file and no recipe is a model, with the recipe recommended; its name is not read as YAML."""
    config = read_target(target, [])
    assert config.model == target and config.name == "recommended"


@pytest.mark.slow
def test_until_a_step_and_on(cli: Run, arguments: list[str]) -> None:
    """What is left is done by --resume."""
    answer = cli(*arguments, "name=a", "--until", "transfer")
    assert answer.code == 0 and "stopped after transfer; --resume does the rest" in answer.out
    assert CHECKPOINT.exists() and not Path("runs/a/model").exists()
    assert cli(*arguments, "name=a", "--resume").code == 0 and Path("runs/a/model").exists()
    cli(*arguments, "--until", "transfre").refused("--until transfre", "finetune, save, control or measure")
