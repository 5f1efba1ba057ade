"""Tiny tokenizers, trained on the spot: nothing is downloaded."""

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tiny import CHATML, train_tokenizer

SENTENCES = [
    "the cat sat on the mat and looked at the moon",
    "a long river runs through the green valley",
    "### Instruction:\nWrite a response to the request.\n\n### Response:\n",
]


def make_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with the end token <end>; with `bos` it puts <begin> before every text."""
    special = ("<begin>", "<end>", "<start>")
    made = train_tokenizer(SENTENCES, 400, special, bos_token="<begin>", model_max_length=8)
    if bos:
        template = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 0)])
        made.backend_tokenizer.post_processor = template
    return made


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that adds no begin token and has a chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def begin_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that puts <begin> before every text by itself."""
    return make_tokenizer(bos=True)


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[[str, Iterable[object]], Path]:
    """Write objects as JSON lines (or texts as they are) to a file of tmp_path, compressed if its name ends in .gz."""

    def write(name: str, lines: Iterable[object]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write
