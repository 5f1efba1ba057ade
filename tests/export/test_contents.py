"""What of a model's folder is exported, and what must be true of it before anything is written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lolcats import LolcatsError, export_model
from lolcats.export import FORMATS

from .conftest import Runs


@pytest.fixture
def model(runs: Runs, tmp_path: Path) -> Path:
    """A model's folder that a test may change."""
    return Path(shutil.copytree(runs().model, tmp_path / "model"))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file outside of the model's folder."""
    (tmp_path / "secret").write_text("secret")
    return tmp_path / "secret"


def test_only_what_belongs_to_a_model_is_exported(model: Path, secret: Path, tmp_path: Path) -> None:
    for name in ("chat_template.jinja", "LICENSE", "merges.txt"):
        (model / name).write_text("x")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("x")
    for name in (".env", "diary.txt", "optimizer.safetensors", "training_args.bin", "secret.json"):
        (model / name).write_text("secret")
    (model / "notes.txt").symlink_to(secret)
    (model / "folder").symlink_to(tmp_path)
    os.mkfifo(model / "tokenizer.model")
    done = export_model(model, tmp_path / "out")
    copied = {str(p.relative_to(done.folder)) for p in done.folder.rglob("*") if p.is_file()}
    assert {"chat_template.jinja", "LICENSE", "merges.txt", "additional_chat_templates/tools.jinja"} <= copied
    assert not [p for p in done.folder.rglob("*") if p.is_file() and b"secret" in p.read_bytes()]
    assert sorted(done.left_out) == sorted(
        [".env", "diary.txt", "folder", "notes.txt", "optimizer.safetensors", "secret.json", "tokenizer.model",
         "training_args.bin"]
    )  # fmt: skip


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "LICENSE", "vocab.json"])
def test_a_link_out_of_the_folder_is_not_followed(model: Path, secret: Path, tmp_path: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    with pytest.raises(LolcatsError, match=rf"{name} is a link to .*secret, outside the folder"):
        export_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_of_the_hubs_cache_and_of_weights_are_followed(model: Path, ids: Tensor, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(model.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    first = export_model(snapshot, tmp_path / "first").folder
    assert not [p for p in first.iterdir() if p.is_symlink()]
    (first / "model.safetensors").rename(tmp_path / "large")
    (first / "model.safetensors").symlink_to(tmp_path / "large")
    second = export_model(first, tmp_path / "second").folder
    assert AutoModelForCausalLM.from_pretrained(second)(input_ids=ids).logits.isfinite().all()


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.self_attn.mixer.feature_q.weight"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.7.mlp.weight"] = torch.zeros(2)


def cut(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][1:].contiguous()


def nan(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][3] = float("nan")


def infinite(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][3] = float("-inf")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"1 missing \(model.layers.1.self_attn.mixer.feature_q.weight\)"),
        (add, r"1 not part of this model \(model.layers.7.mlp.weight\)"),
        (cut, r"1 of another shape \(lm_head.weight"),
        (nan, r"model.norm.weight has values that are not finite"),
        (infinite, r"model.norm.weight has values that are not finite"),
    ],
)
def test_weights_that_are_not_whole_are_refused(
    runs: Runs, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str, format: str
) -> None:
    run = Path(shutil.copytree(runs().path, tmp_path / "run"))
    tensors = load_file(run / "model" / "model.safetensors")
    change(tensors)
    save_file(tensors, run / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LolcatsError, match=message):
        export_model(run, tmp_path / "out", format)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def remove(model: Path) -> None:
    (model / "model.safetensors").unlink()


def truncate(model: Path) -> None:
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-10])


def point_outside(model: Path) -> None:
    (model / "model.safetensors").rename(model.parent / "x.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))


def break_index(model: Path) -> None:
    remove(model)
    (model / "model.safetensors.index.json").write_text("[]")


def lose_a_part(model: Path) -> None:
    remove(model)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))


def break_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def unlinearize(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


def numbers_of_nobody(model: Path) -> None:
    (model / "lolcats_results.json").write_text('{"perplexity": [1, 2]}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, r"has no weights: expected model.safetensors"),
        (truncate, r"cannot read .*model.safetensors"),
        (point_outside, r"names '../x.safetensors'; expected"),
        (break_index, r"is not an index of weights"),
        (lose_a_part, r"b.safetensors is missing"),
        (break_config, r"cannot be loaded, so it is not exported"),
        (unlinearize, r"holds no linearized model"),
        (numbers_of_nobody, r"lolcats_results.json cannot be used: perplexity.*delete it to export"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(
    model: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    change(model)
    with pytest.raises(LolcatsError, match=message):
        export_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
