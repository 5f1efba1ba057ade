"""`lolcats export`."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM

from lolcats import load_adapter
from lolcats.export.hub import HTTP_ERROR

from .conftest import Run


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 30)[None]).logits


@pytest.mark.slow
def test_every_format_is_the_model(cli: Run, finished: Path) -> None:
    """The run's folder or the model's; what is printed is where it is and how large."""
    expected = logits(AutoModelForCausalLM.from_pretrained(finished / "model"))
    merged = cli("export", finished, "m")
    assert merged.code == 0 and merged.err == "" and merged.out.startswith("merged: m, ")
    assert f"no report beside it: lolcats report {finished} makes one" in merged.out
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("m")), expected)
    code = cli("export", finished / "model", "r", "--format", "remote-code")
    assert "report" not in code.out, "it may be that of a model without a run"
    assert code.code == 0 and Path("r/modeling_lolcats.py").is_file() and code.out.startswith("remote-code: r, ")
    adapter = cli("export", finished, "a", "--format", "adapter")
    assert adapter.code == 0 and "% of the model's" in adapter.out
    torch.testing.assert_close(logits(load_adapter("a")[0]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_exported_model_serves_the_other_verbs(cli: Run, finished: Path) -> None:
    assert cli("export", finished, "m").code == 0
    assert cli("inspect", "m").out == cli("inspect", finished).out.replace(f"report {finished}", "report m")
    words = ["the cat", "--max-new-tokens", "4"]
    assert cli("generate", "m", *words).out == cli("generate", finished, *words).out


def test_mistakes_take_one_line(cli: Run, place: Path, finished: Path) -> None:
    cli("export", "nowhere", "out").refused("nowhere", "lolcats linearize")
    cli("export", finished, "out", "--format", "gguf").refused("'gguf'", "merged, adapter, remote-code")
    cli("export", place / "teacher", "out").refused("lolcats_recipe.yaml")
    cli("export", finished, finished, "--overwrite").refused("choose another folder")
    cli("export", finished, "out", "--private").refused("--push-to-hub")
    assert not Path("out").exists()
    assert cli("export", finished, "out").code == 0
    cli("export", finished, "out").refused("--overwrite")
    assert cli("export", finished, "out", "--overwrite").code == 0


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that would have gone to the hub."""
    calls: list[Any] = []
    monkeypatch.setenv("HF_TOKEN", "hf_test")

    def create(self: HfApi, repo_id: str, **options: Any) -> str:
        calls.append(("create", repo_id, options["private"], options["exist_ok"]))
        return f"https://hub/{repo_id}"

    def upload(self: HfApi, *, repo_id: str, folder_path: Path, **options: Any) -> None:
        calls.append(("upload", repo_id, {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}))

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return calls


@pytest.mark.parametrize("private", [True, False])
def test_push(cli: Run, finished: Path, hub: list[Any], private: bool) -> None:
    """What goes to the hub is the folder, under the names that readers know, without this machine's paths."""
    words = ["--push-to-hub", "me/mine", "--base", "someone/teacher", *(["--private"] if private else [])]
    answer = cli("export", finished, "out", "--format", "adapter", *words)
    assert answer.code == 0 and "uploaded: https://hub/me/mine" in answer.out
    (created, uploaded) = hub
    assert created == ("create", "me/mine", private, True)
    assert uploaded[:2] == ("upload", "me/mine")
    assert uploaded[2] == {p.name: p.read_bytes() for p in Path("out").iterdir()}
    assert b'load_adapter("me/mine")' in uploaded[2]["README.md"]
    assert not [n for n, data in uploaded[2].items() if str(finished.parent.parent).encode() in data]


def test_push_is_refused_before_anything_is_written(
    cli: Run, finished: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    push = ["export", finished, "out", "--push-to-hub"]
    cli(*push, "me/mine").refused("--base NAME")
    cli(*push, "mine", "--base", "someone/teacher").refused("USER/NAME")
    cli(*push, "me/mi ne", "--base", "someone/teacher").refused("'me/mi ne'")
    monkeypatch.setattr(importlib.import_module("lolcats.export.hub"), "get_token", lambda: None)
    cli(*push, "me/mine", "--base", "someone/teacher").refused("nobody is logged in", "hf auth login")
    assert hub == [] and not Path("out").exists()


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no route"),
        HTTP_ERROR("no route"),
        HfHubHTTPError("no route\nlong story", response=cast(Any, SimpleNamespace(headers={}, request=None))),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_that_says_no(
    cli: Run, finished: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The folder is there all the same."""

    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    answer = cli("export", finished, "out", "--base", "someone/teacher", "--push-to-hub", "me/mine")
    answer.refused("cannot upload to me/mine: no route; out is complete")
    assert Path("out/config.json").is_file()
