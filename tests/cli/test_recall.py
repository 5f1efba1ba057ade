"""`lolcats recall`, and `lolcats evaluate --beyond`."""

import json
import sqlite3
from pathlib import Path

import pytest

from lolcats.evaluation.recall import recall as real_recall

from .conftest import Run

WORDS = ["--lengths", "400,500", "--samples", "3", "--depths", "3"]


@pytest.mark.slow
def test_recall_of_all_columns(cli: Run, finished: Path) -> None:
    """A table of tasks, one by depth, and every answer in the JSON file."""
    answer = cli("recall", finished, "passkey,vt", "--lengths", "1500", *WORDS[2:], "--json", "x.json")
    assert answer.code == 0 and answer.err == ""
    assert "passkey by depth" in answer.out and "vt by depth" not in answer.out
    for column in ("teacher", "training", "equal", "trained", "student", "window", "linear", "attention", "67-100"):
        assert column in answer.out
    assert "3 prompts per task and length, seed 0" in answer.out and "from 32 tokens on" in answer.out
    content = json.loads(Path("x.json").read_text())
    assert len(content["cells"]) == 2 * 8 and content["lengths"] == [1500]
    assert all(len(cell["samples"]) == 3 for cell in content["cells"])
    assert not Path("x.json.progress").exists()


@pytest.mark.slow
def test_recall_of_a_teacher_repeats(cli: Run, place: Path) -> None:
    """The same command, the same file; another seed, other prompts."""
    words = ["recall", place / "teacher", *WORDS]
    files = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert cli(*words, "--json", name, "--seed", seed).code == 0
        files.append(json.loads(Path(name).read_text())["cells"])
    assert files[0] == files[1] != files[2]


def test_interrupted_recall_goes_on(cli: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C says so; the same command asks only what is missing."""
    words = ["recall", place / "teacher", "passkey", *WORDS, "--json", "x.json"]
    seen: list[str] = []

    def stop(name: str, done: int, count: int) -> None:
        seen.append(name)
        if done == 1:
            raise KeyboardInterrupt

    def interrupted(*args: object, **options: object) -> object:
        return real_recall(*args, **(options | {"report": stop}))  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("lolcats.evaluation.recall.recall", interrupted)
        answer = cli(*words)
    assert answer.code == 130 and "goes on from there" in answer.err and not Path("x.json").exists()
    assert seen == ["teacher, passkey, 400 tokens", "teacher, passkey, 500 tokens"]
    with sqlite3.connect("x.json.progress") as database:
        assert database.execute("SELECT COUNT(*) FROM answers").fetchone() == (1,)
    database.close()
    answer = cli(*words)
    assert answer.code == 0 and "going on with an evaluation that was interrupted" in answer.out
    assert not Path("x.json.progress").exists()
    assert len(json.loads(Path("x.json").read_text())["cells"]) == 2


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["recall", "paskey"], ["'paskey'", "did you mean passkey?"]),
        (["recall", ","], ["no task is named"]),
        (["recall", "--lengths", "1k"], ["--lengths", "'1k'"]),
        (["recall", "--lengths", "0"], ["--lengths", "'0'"]),
        (["recall", "--lengths", "50"], ["passkey", "50 tokens", "give more"]),
        (["recall", "--lengths", "4096"], ["4,096", "context of 2,048", "--beyond-context"]),
        (["recall", "niah_single_2", "--haystack", "gone.txt"], ["gone.txt", "matches no file"]),
        (["recall", "--json", "gone/x.json"], ["no folder gone"]),
        (["recall", "--json", "."], ["is a folder"]),
        (["evaluate", "--json", "~/no/such/x.json"], ["no folder", "/no/such"]),
        (["recall", "--plot", "~/no/such/x.png"], ["no folder", "/no/such"]),
        (["recall", "--lengths", "9" * 5000], ["--lengths"]),
        (["recall", "--length", "512"], ["--length"]),
        (["evaluate", "--recall", "passkey"], ["lolcats recall"]),
        (["evaluate", "--beyond", "4"], ["--beyond", "--length"]),
    ],
)
def test_refusals(cli: Run, place: Path, words: list[str], parts: list[str]) -> None:
    """One line each."""
    cli(words[0], place / "teacher", *words[1:]).refused(*parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["recall", "vt,niah_single_3", "--haystack", "gone.txt"], ["gone.txt", "matches no file"]),
        (["evaluate", "--sources", "gone.txt"], ["gone.txt", "matches no file"]),
        (["evaluate", "--sources", "hf:./gone::test"], ["./gone", "no split 'test'"]),
        (["evaluate", "--sources", "a.txt", "--length", "64", "--last", "64"], ["last=64"]),
    ],
)
def test_wrong_text_is_found_before_the_model_is_loaded(cli: Run, words: list[str], parts: list[str]) -> None:
    """Minutes of loading come after what can be said at once: here there is no model at all."""
    Path("gone").mkdir()
    Path("gone/train.jsonl").write_text('{"text": "x"}')
    cli(words[0], "./no-model", *words[1:]).refused(*parts)


def test_broken_progress_is_named(cli: Run, place: Path) -> None:
    """And what to do with it."""
    for content in ("[]" * 400, '{"settings": {}, "cells": []}' * 40):
        Path("x.json.progress").write_text(content)
        cli("recall", place / "teacher", *WORDS, "--json", "x.json").refused("x.json.progress", "move it away")


@pytest.mark.slow
def test_home_is_expanded(cli: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the name of the file that is written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--length", "16", "--max-segments", "1", "--json", "~/x.json"]
    answer = cli("evaluate", place / "teacher", *words)
    assert answer.code == 0 and (tmp_path / "x.json").is_file() and "the default text" in answer.out


def test_a_model_without_tokenizer(cli: Run, place: Path, tmp_path: Path) -> None:
    """Its folder is named."""
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((place / "teacher" / file).read_bytes())
    cli("recall", tmp_path).refused(str(tmp_path), "tokenizer")


@pytest.mark.slow
def test_perplexity_beyond_the_training_texts(cli: Run, place: Path, finished: Path) -> None:
    """Four times as long, by position, with a word on where the training ended."""
    answer = cli("evaluate", finished, "--sources", place / "text.txt", "--beyond", "4", "--json", "x.json")
    assert answer.code == 0 and "from 32 tokens on: beyond the texts of the linearization" in answer.out
    scores = json.loads(Path("x.json").read_text())["scores"]
    assert all(list(score["by_position"]) == ["1-32", "32-64", "64-128"] for score in scores.values())
    assert len(scores) == 8 and scores["teacher"]["context"] == 2048
    cli("evaluate", finished, "--beyond", "4", "--length", "64").refused("--beyond", "--length")


def test_perplexity_beyond_the_context(cli: Run, place: Path, tmp_path: Path) -> None:
    """A rotary teacher reads on, and the table says where it was not made for that."""
    (tmp_path / "long.txt").write_text((place / "text.txt").read_text() * 6)
    words = ["--sources", tmp_path / "long.txt", "--max-segments", "1", "--by-position"]
    answer = cli("evaluate", place / "teacher", "--length", "3000", *words)
    assert answer.code == 0 and "2048-3000" in answer.out
    assert "from 2,048 tokens on: beyond the context" in answer.out
