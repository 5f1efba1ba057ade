"""What an unfinished evaluation has measured so far, in one file, so that the same command goes on from there."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.errors import LolcatsError
from lolcats.files import cache_root

PIECE = 1 << 22
"""Numbers of a tensor that are hashed at a time; bounds the memory for their 64-bit copies."""


class Progress:
    """Answers under keys, each on disk before the next is computed.

    A key names all that an answer depends on, so a changed model or setting finds nothing under it.

    Args:
        file: an SQLite database, made when missing; None keeps everything in memory.

    Raises:
        LolcatsError: the file cannot be written, or is something else.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        try:
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(":memory:" if file is None else file)
            weakref.finalize(self, self._database.close)  # newer Pythons warn of one that is left open
            self._database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._database.commit()
        except (sqlite3.Error, OSError) as error:
            raise LolcatsError(
                f"{file} cannot hold the progress of an evaluation: {error}; move it away, or write elsewhere"
            ) from error

    def get(self, key: str) -> Any:
        """The answer under a key, None where there is none."""
        try:
            row = self._database.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
            return None if row is None else json.loads(row[0])
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise LolcatsError(f"{self.file} is damaged ({error}); delete it: what it held is measured anew") from error

    def put(self, key: str, value: Any) -> None:
        """Keep an answer; it is on disk when this returns. Numbers come back exactly as they were."""
        try:
            with self._database:
                self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(value)))
        except sqlite3.Error as error:
            raise LolcatsError(f"cannot write {self.file}: {error}") from error

    def close(self, *, remove: bool = False) -> None:
        """Close the file, and delete it if nothing is left to do."""
        self._database.close()
        if remove and self.file is not None:
            self.file.unlink(missing_ok=True)


def default_file(*names: object) -> Path:
    """Where progress is kept when no other place was given: in the cache folder, a file for each `names`."""
    return cache_root() / "evaluations" / f"{key_of(*names)[:16]}.progress"


def key_of(*parts: object) -> str:
    """A hash of values that JSON can spell."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


@torch.no_grad()
def model_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of a model's weights, settings, device and number format, and of its tokenizer.

    Sums of the bits as integers, which come out the same in whatever order a device adds; not proof against forgery.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    weights = {name: [str(tensor.dtype), list(tensor.shape), *_bit_sums(tensor)] for name, tensor in tensors}
    settings = model.config.to_json_string(use_diff=False)
    words = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template]
    return key_of(weights, settings, model.device.type, words, _rules(tokenizer))


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How a fast tokenizer cuts text, without the padding and truncation that its last call left in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    return {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}


def _bit_sums(tensor: Tensor) -> list[int]:
    """Two sums of the raw bits as integers: one weighted by place, one of squares; 64-bit, so they may wrap."""
    if tensor.numel() == 0 or tensor.is_meta:
        return [0, 0]
    bits = tensor.detach().contiguous().flatten()
    if bits.dtype == torch.bool:
        bits = bits.to(torch.uint8)
    if bits.is_floating_point():
        bits = bits.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[bits.element_size()])
    first = second = 0
    for piece in bits.split(PIECE):
        wide = piece.to(torch.int64)
        place = torch.arange(1, len(wide) + 1, device=wide.device)
        first += int((wide * place).sum())
        second += int((wide * wide).sum())
    return [first, second]
