"""What a person can get wrong: one line on stderr that says how to mend it, a failing exit code, no traceback."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lolcats.cli import main
from tiny import chat_tokenizer

from .conftest import Run


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model with the tiny tokenizer."""
    model.save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("linearization.windw=8", ["unknown key", "linearization.window"]),
        ("finetune.lr=fast", ["finetune.lr", "'fast'"]),
        ("transfer.tokens=0", ["transfer.tokens", "greater than or equal to 1"]),
        ("device=gpu", ["device", "'gpu'"]),
        ("linearization.layers=[0,9]", ["layers [9]", "[0, 1]"]),
        ("data.sequence_length=1", ["data.sequence_length", "greater than or equal to 2"]),
        ("data.sequence_length=4096", ["data too small", "lower data.sequence_length"]),
        ("data.sources=[nowhere.txt]", ["nowhere.txt", "matches no file"]),
        ("finetune.targets=[nothing_proj]", ["nothing_proj"]),
        ("evaluation.last=32", ["evaluation.last=32", "segment length"]),
        ("name=../up", ["name"]),
        ("window", ["key=value"]),
    ],
)
def test_wrong_setting(cli: Run, arguments: list[str], setting: str, parts: list[str]) -> None:
    """A setting that cannot be used, named with what was expected."""
    cli(*arguments, "name=a", setting).refused(*parts)


def test_all_wrong_settings_come_in_one_line(cli: Run, arguments: list[str]) -> None:
    """Nobody wants to learn of them one by one."""
    cli(*arguments, "seed=-1", "finetune.rnk=2").refused("seed", "finetune.rank")


def test_missing_configuration(cli: Run) -> None:
    """A YAML file that is not there."""
    cli("linearize", "nowhere.yaml").refused("nowhere.yaml", "recommended")


def test_broken_configuration(cli: Run, tmp_path: Path) -> None:
    """YAML that cannot be parsed takes several lines in the parser's own words."""
    (tmp_path / "bad.yaml").write_text("model: [demo\nname: x\n")
    cli("linearize", "bad.yaml").refused("bad.yaml")


@pytest.mark.parametrize("verb", ["linearize", "evaluate", "generate", "chat", "inspect"])
def test_missing_model(cli: Run, verb: str) -> None:
    """A folder that is not there."""
    extra = {"generate": ["hello"], "linearize": ["device=cpu"]}.get(verb, [])
    cli(verb, "./nowhere", *extra).refused("./nowhere")


def test_empty_data(cli: Run, arguments: list[str], tmp_path: Path) -> None:
    """A file without text."""
    (tmp_path / "empty.txt").write_text(" \n")
    cli(*arguments, "data.sources=[empty.txt]").refused("empty.txt", "no text")


@pytest.mark.slow
def test_encoder_decoder(cli: Run, arguments: list[str], tmp_path: Path) -> None:
    """T5 is no decoder-only model."""
    config = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    folder = save(T5ForConditionalGeneration(config), tmp_path / "t5")
    cli("linearize", folder, *arguments[2:]).refused("T5")
    answer = cli("inspect", folder)
    assert answer.code == 0 and "cannot be linearized" in answer.out and "encoder-decoder" in answer.out


def falcon() -> PreTrainedModel:
    """A model whose attention does not go through transformers' interface."""
    return FalconForCausalLM(FalconConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))


def mamba() -> PreTrainedModel:
    """A model without attention."""
    return MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=1))


@pytest.mark.parametrize("build", [falcon, mamba])
def test_attention_that_cannot_be_taken_over(
    cli: Run, arguments: list[str], tmp_path: Path, build: Callable[[], PreTrainedModel]
) -> None:
    """The line names the model and families that work."""
    folder = save(build(), tmp_path / "model")
    cli("linearize", folder, *arguments[2:]).refused("cannot be linearized", "Llama")
    answer = cli("inspect", folder)
    assert answer.code == 0 and "cannot be linearized" in answer.out


def test_linearized_model_is_not_linearized_again(cli: Run, arguments: list[str], finished: Path) -> None:
    """Its teacher should be."""
    cli("linearize", finished / "model", *arguments[2:]).refused("already linearized")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("verb", ["linearize", "evaluate", "generate"])
def test_absent_gpu(cli: Run, arguments: list[str], finished: Path, verb: str) -> None:
    """An explicit request is never quietly changed."""
    commands = {
        "linearize": [*arguments, "device=cuda"],
        "evaluate": ["evaluate", finished, "--device", "cuda"],
        "generate": ["generate", finished, "the cat", "--device", "cuda"],
    }
    cli(*commands[verb]).refused("'cuda'", "this machine has none")


@pytest.mark.slow
def test_loss_that_is_not_finite(cli: Run, arguments: list[str]) -> None:
    """The stage and the step are named."""
    settings = ["finetune.lr=1e30", "finetune.warmup_steps=0", "finetune.tokens=640"]
    cli(*arguments, *settings).refused("finetune: the loss is", "step")


def test_full_disk(cli: Run, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An OSError from anywhere."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "runs/a/metrics.jsonl")

    monkeypatch.setattr("lolcats.training.report.Reporter._write", fail)
    cli(*arguments).refused("runs/a/metrics.jsonl: No space left on device")


def test_folder_that_cannot_be_made(cli: Run, arguments: list[str], tmp_path: Path) -> None:
    """The runs folder is a file."""
    (tmp_path / "file").write_text("")
    cli(*arguments, "runs_dir=file").refused("file")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["foo"], ["No such command"]),
        (["generate", "m"], ["PROMPT"]),
        (["inspect", "m", "--colour"], ["--colour"]),
        (["generate", "m", "p", "--top-p", "2"], ["--top-p"]),
        (["generate", "m", "p", "--dtype", "int8"], ["int8", "bfloat16"]),
        (["generate", "m", "p", "--device", "gpu"], ["gpu", "cuda"]),
        (["evaluate", "m", "--control", "all"], ["window_only"]),
        (["evaluate", "m", "--json", "no/such/file.json"], ["no folder"]),
        (["generate", "m", ""], ["prompt is empty"]),
    ],
)
def test_wrong_words(cli: Run, words: list[str], parts: list[str]) -> None:
    """Commands that cannot be understood."""
    cli(*words).refused(*parts)


def test_run_without_a_model_yet(cli: Run, tmp_path: Path) -> None:
    """The command to finish it is in the line."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("name: run\n")
    cli("generate", "run", "hello").refused("lolcats linearize run/config.yaml --resume")


def test_broken_artefact(cli: Run, tmp_path: Path) -> None:
    """A config.json that says lolcats and lacks the rest."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps({"model_type": "lolcats"}))
    cli("inspect", "m").refused("base_model_type")
    cli("generate", "m", "hello").refused("base_model_type")


def test_error_of_our_own(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the user's fault, still one line; --debug shows where, before or after the verb."""

    def fail(source: str) -> str:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("lolcats.cli.inspect.find_model", fail)
    cli("inspect", "m").refused("unexpected RuntimeError: first; second", "--debug")
    for words in (["--debug", "inspect", "m"], ["inspect", "m", "--debug"]):
        answer = cli(*words)
        assert answer.code == 1 and "Traceback" in answer.err and answer.err.splitlines()[-1].startswith("error: ")


def test_other_processes_say_who_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a distributed run every process may fail by itself."""
    monkeypatch.setenv("RANK", "3")
    assert main(["foo"]) == 2
    assert capsys.readouterr().err.startswith("[process 3] error: ")
