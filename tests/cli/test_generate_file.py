"""`lolcats generate MODEL --input FILE --output FILE`."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import forked
from lolcats.cli.failures import INTERRUPTED

from .conftest import Run

ROWS = [
    {"id": "a", "prompt": "the cat sat on the mat", "max_new_tokens": 7},
    {"messages": [{"role": "user", "content": "the moon"}], "metadata": {"gold": 1}},
    {"prompt": ""},
    {"custom_id": "b", "prompt": "a long river", "temperature": 1.0, "max_tokens": 3},
]


def write_rows(*rows: Any, name: str = "in.jsonl") -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(name: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def test_rows_have_their_answers_in_order(cli: Run, finished: Path) -> None:
    """Those of one text at a time; a row that cannot be done is named at once and in its answer."""
    write_rows(*ROWS)
    words = ["--input", "in.jsonl", "--output", "out.jsonl", "--batch-size", "2", "--max-new-tokens", "5"]
    answer = cli("generate", finished, *words)
    assert answer.code == 0 and answer.out == ""
    assert "in.jsonl:3: the tokenizer makes no token" in answer.err
    assert "4 rows in out.jsonl, 1 of them with an error; 15 new tokens, " in answer.err
    assert "tokens/s" in answer.err
    found = read_rows()
    assert [row["index"] for row in found] == [0, 1, 2, 3] and [row["id"] for row in found] == ["a", None, None, "b"]
    assert [row["new_tokens"] for row in found] == [7, 5, 0, 3]
    assert [row["finish_reason"] for row in found] == ["length", "length", "error", "length"]
    assert found[1]["metadata"] == {"gold": 1} and found[2]["text"] is None
    alone = cli("generate", finished, ROWS[0]["prompt"], "--max-new-tokens", "7", "--no-stream")
    assert found[0]["text"] == alone.out.removesuffix("\n")
    assert sorted(os.listdir()) == ["in.jsonl", "out.jsonl"]


def test_texts_longer_than_those_of_the_measurement_are_noted(cli: Run, finished: Path) -> None:
    """In a line that says how long those were; once for a file."""
    measured = json.loads((finished / "model" / "lolcats_results.json").read_text())["evaluation"]["length"]
    said = f"measured on texts of {measured}: lolcats evaluate {finished} --length {measured + 1} --by-position"
    write_rows({"prompt": "the", "max_new_tokens": 2}, {"prompt": "the", "max_new_tokens": measured})
    lines = cli("generate", finished, "--input", "in.jsonl", "--output", "out.jsonl").err.splitlines()
    lines += cli("generate", finished, "the", "--max-new-tokens", measured).err.splitlines()
    notes = [line for line in lines if line.startswith("note: ")]
    assert len(notes) == 2 and all(said in line for line in notes), lines
    short = cli("generate", finished, "the", "--max-new-tokens", measured - 1)
    assert short.code == 0 and "note" not in short.err


def test_what_is_there_is_replaced_only_when_asked(cli: Run, finished: Path) -> None:
    """And never the input."""
    write_rows(ROWS[0])
    Path("out.jsonl").write_text("mine")
    words = ["generate", finished, "--input", "in.jsonl", "--output"]
    cli(*words, "out.jsonl").refused("out.jsonl is there already", "--overwrite")
    assert Path("out.jsonl").read_text() == "mine"
    cli(*words, "in.jsonl", "--overwrite").refused("in.jsonl is the input")
    assert cli(*words, "out.jsonl", "--overwrite").code == 0 and len(read_rows()) == 1


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["text", "--input", "in.jsonl", "--output", "x"], ["PROMPT", "--input"]),
        (["--no-stream", "--input", "in.jsonl", "--output", "x"], ["--no-stream", "--input"]),
        (["--input", "in.jsonl"], ["--output FILE"]),
        (["text", "--output", "x"], ["--input FILE"]),
        (["text", "--batch-size", "2"], ["--batch-size", "--input FILE"]),
        (["text", "--chunk", "2"], ["--chunk", "--input FILE"]),
        (["text", "--overwrite"], ["--overwrite", "--input FILE"]),
        ([], ["PROMPT", "--input FILE"]),
        (["--input", "gone.jsonl", "--output", "x"], ["cannot read gone.jsonl", "No such file"]),
        (["--input", ".", "--output", "x"], ["cannot read .", "directory"]),
        (["--input", "in.jsonl", "--output", "gone/x"], ["no folder gone"]),
        (["--input", "broken.jsonl", "--output", "x"], ["broken.jsonl:2: broken JSON"]),
        (["--input", "list.jsonl", "--output", "x"], ["list.jsonl:1: expected a JSON object"]),
        (["--input", "empty.jsonl", "--output", "x"], ["empty.jsonl has no rows"]),
    ],
)
def test_refused_before_the_model_is_loaded(cli: Run, words: list[str], parts: list[str]) -> None:
    """In one line: there is no model "nothing"."""
    write_rows(ROWS[0])
    Path("broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    Path("list.jsonl").write_text("[1]\n")
    Path("empty.jsonl").write_text("\n")
    cli("generate", "nothing", *words).refused(*parts)
    assert not Path("x").exists() and not list(Path().glob("*.progress"))


def test_a_file_of_progress_that_is_none_is_named_in_words_of_this_command(cli: Run, finished: Path) -> None:
    write_rows(ROWS[0])
    Path("out.jsonl.progress").write_text("mine")
    answer = cli("generate", finished, "--input", "in.jsonl", "--output", "out.jsonl")
    answer.refused("out.jsonl.progress cannot hold finished answers", "move it away")
    assert "evaluation" not in answer.err and Path("out.jsonl.progress").read_text() == "mine"


def test_a_teacher_writes_too(cli: Run, place: Path) -> None:
    """Whose softmax attention keeps more for longer texts; rows of several lengths at once."""
    write_rows(ROWS[0], {"prompt": "the"})
    words = ["--input", "in.jsonl", "--output", "out.jsonl", "--max-new-tokens", "9"]
    assert cli("generate", place / "teacher", *words).code == 0
    alone = cli("generate", place / "teacher", "the", "--max-new-tokens", "9", "--no-stream")
    assert read_rows()[1]["text"] == alone.out.removesuffix("\n") != ""


MANY = 60
"""Some seconds of work: what is finished is on the disk a second later at most."""


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished(cli: Run, finished: Path, environment: dict[str, str], tmp_path: Path) -> None:
    """And the same command goes on, to the same answers."""
    write_rows(*({"prompt": f"the cat {row}", "max_new_tokens": 20} for row in range(MANY)))
    words = ["generate", str(finished), "--input", "in.jsonl", "--batch-size", "2", "--temperature", "1", "--output"]
    process = forked.start(["-m", "lolcats.cli", *words, "out.jsonl"], tmp_path, environment, error="err")
    kept = Path("out.jsonl.progress")
    while process.is_alive() and not (kept.exists() and _answers(kept) > 2):
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(200)
    assert Path("err").read_text().splitlines()[-1] == INTERRUPTED["generate --input"]
    assert process.exitcode == 130 and _answers(kept) > 2 and not Path("out.jsonl").exists()
    answer = cli(*words, "out.jsonl")
    assert answer.code == 0 and f"going on with rows that were finished before ({kept})" in answer.err
    assert 0 < int(answer.err.split("; ")[1].split(" new tokens")[0].replace(",", "")) < MANY * 20 - 40
    assert cli(*words, "whole.jsonl").code == 0
    assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes() and not kept.exists()


def _answers(file: Path) -> int:
    """In a file of progress that a process may be making."""
    import sqlite3

    try:
        database = sqlite3.connect(file)
        try:
            return int(database.execute("SELECT count(*) FROM answers").fetchone()[0])
        finally:
            database.close()
    except sqlite3.OperationalError:
        return 0
