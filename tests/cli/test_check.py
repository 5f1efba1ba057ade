"""`lolcats check`: a line per fact, and a refusal in one line."""

from pathlib import Path

from .conftest import Run


def test_check_of_teacher_and_student(cli: Run, place: Path, finished: Path) -> None:
    for model in (place / "teacher", finished):
        answer = cli("check", model, "--device", "cpu", "--dtype", "float32")
        assert answer.code == 0 and answer.err == "", answer.err
        lines = answer.out.splitlines()
        assert len(lines) == 10 and all(line.startswith("ok ") for line in lines[:-1])
        assert lines[-1] == "LlamaForCausalLM: understood"


def test_check_of_nothing(cli: Run) -> None:
    cli("check", "./no-such-folder").refused("no-such-folder")
