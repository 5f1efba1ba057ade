"""Tiny tokenizers, trained on the spot: nothing is downloaded."""

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "the cat sat on the mat and looked at the moon",
    "a long river runs through the green valley",
    "### Instruction:\nWrite a response to the request.\n\n### Response:\n",
]
CHATML = (
    "{% for m in messages %}{{ '<start>' + m['role'] + '\n' + m['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)


def train_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with the end token <end>; with `bos` it puts <begin> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<begin>", "<end>", "<start>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<begin>", eos_token="<end>", model_max_length=8
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that adds no begin token and has a chat template."""
    tokenizer = train_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def begin_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that puts <begin> before every text by itself."""
    return train_tokenizer(bos=True)


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
