"""A tiny teacher on disk, a finished run of it, and the command line as a function."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers.utils import logging

from lolcats.cli import main
from tiny import SENTENCE, chat_tokenizer, save_teacher

TINY = [
    "device=cpu",
    "dtype=float32",
    "data.sequence_length=32",
    "data.validation_sequences=2",
    "linearization.mixer=hybrid",
    "linearization.start=matched",
    "linearization.sinks=4",
    "linearization.window=8",
    "transfer.recall.share=0",
    "finetune.recall.share=0",
    "transfer.tokens=128",
    "transfer.batch_size=2",
    "finetune.tokens=128",
    "finetune.batch_size=2",
    "finetune.rank=2",
    "transfer.checkpoint_every=1",
]


@dataclass
class Answer:
    """What a command gave back."""

    code: int
    out: str
    err: str

    def refused(self, *parts: str) -> None:
        """Assert one line on stderr that holds `parts`, a failing exit code and no traceback."""
        assert self.code != 0
        assert self.err.count("\n") == 1 and self.err.startswith("error: "), self.err
        assert "Traceback" not in self.err + self.out
        for part in parts:
            assert part in self.err, self.err


Run = Callable[..., Answer]


@pytest.fixture(scope="session", autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars of transformers, whose state is global and is put back."""
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(level)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, quiet: None) -> Path:
    """Folder with teacher/, a Llama of two layers, and text.txt."""
    folder = tmp_path_factory.mktemp("cli")
    save_teacher(folder / "teacher", chat_tokenizer())
    (folder / "text.txt").write_text(SENTENCE * 40)
    return folder


@pytest.fixture(scope="session")
def arguments(place: Path) -> list[str]:
    """`linearize` with settings that take about a second; a test adds runs_dir."""
    return ["linearize", str(place / "teacher"), f"data.sources=['{place / 'text.txt'}']", *TINY]


@pytest.fixture(scope="session")
def finished(place: Path, arguments: list[str]) -> Path:
    """Folder of a finished run; not to be changed."""
    assert main([*arguments, f"runs_dir={place / 'runs'}", "name=tiny"]) == 0
    return place / "runs" / "tiny"


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """The command line in this process, with tmp_path as the working folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Answer:
        capfd.readouterr()
        code = main([str(word) for word in words])
        captured = capfd.readouterr()
        return Answer(code, str(captured.out), str(captured.err))

    return run


@pytest.fixture
def environment() -> dict[str, str]:
    """Of a subprocess that runs this package."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": ""}
