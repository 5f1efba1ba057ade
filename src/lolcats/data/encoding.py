"""From records to tokens, and from files that hold tokens already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lolcats.data.documents import Documents, EncodedDocument
from lolcats.data.sources import Record
from lolcats.data.templates import Template, render
from lolcats.errors import DataError
from lolcats.identity import begin_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORDS = 256  # tokenised in one call: enough to keep the tokenizer's threads busy
_SCAN = 1 << 24  # tokens of a file that are looked at in one go
_LEAST = 16  # tokens from which on a pattern in them is no accident


def encode(
    records: Iterable[Record], template: Template, tokenizer: PreTrainedTokenizerBase, add_eos: bool = True
) -> Iterator[EncodedDocument]:
    """Render and tokenise records, in order; documents without a single token are left out.

    Each document begins with the tokenizer's begin token where the tokenizer itself would put one, and ends with its
    end token if `add_eos`; a rendered text that brings these tokens along keeps just its own.

    Raises:
        DataError: no end token to add, a record with a prompt under a slow tokenizer, or what `render` raises.
    """
    for _, documents in encode_batches(records, template, tokenizer, add_eos):
        yield from documents


def encode_batches(
    records: Iterable[Record],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    add_eos: bool = True,
    batch_size: int = RECORDS,
) -> Iterator[tuple[int, list[EncodedDocument]]]:
    """As `encode`, in batches: how many records were read for it, and the documents that they gave."""
    yield from encode_texts((render(record, template, tokenizer) for record in records), tokenizer, add_eos, batch_size)


def encode_texts(
    texts: Iterable[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    add_eos: bool = True,
    batch_size: int = RECORDS,
) -> Iterator[tuple[int, list[EncodedDocument]]]:
    """As `encode_batches`, of pairs (prompt, response)."""
    eos = tokenizer.eos_token_id
    if add_eos and eos is None:
        raise DataError("the tokenizer has no eos token to end documents with; set tokenizer.eos_token")
    begin = begin_ids(tokenizer)
    end = [eos] if add_eos else []
    remaining = iter(texts)
    while batch := list(islice(remaining, batch_size)):
        documents = []
        for ids, prompt_length in zip(*_tokenise(batch, tokenizer), strict=True):
            head = [] if ids[:1] == begin else begin
            tail = [] if ids[-1:] == end else end
            if ids or tail:
                prompt_length += len(head) if prompt_length else 0
                documents.append(EncodedDocument(np.array([*head, *ids, *tail], np.int32), prompt_length))
        yield len(batch), documents


def _tokenise(
    batch: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[int]]:
    """Tokenise prompt and response as one text, and count the tokens that begin inside the prompt."""
    prompts = [prompt for prompt, _ in batch]
    if any(prompts) and not tokenizer.is_fast:
        raise DataError("records with a prompt need a fast tokenizer, which tells where each token begins")
    encoded = tokenizer(
        [prompt + response for prompt, response in batch],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=any(prompts),
        verbose=False,  # no warning about texts longer than the model's context: they are cut when packed
    )
    if not any(prompts):
        return encoded["input_ids"], [0] * len(prompts)
    # Tokenising the parts one by one would give other tokens: some tokenizers put a space before every text.
    starts = [[start for start, _ in spans] for spans in encoded["offset_mapping"]]
    lengths = [int(np.searchsorted(start, len(prompt))) for start, prompt in zip(starts, prompts, strict=True)]
    return encoded["input_ids"], lengths


def token_file(path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None) -> Documents:
    """Map a raw file of little-endian token ids; each end token closes a document.

    Args:
        path: the file, uint32 if its name ends in .u32, else uint16. Without an end token in it (or in the tokenizer)
            it is one document.
        tokenizer: the one that made the tokens.
        max_tokens: read at most this many from the beginning.

    Raises:
        DataError: an empty file, one cut inside a token, integers of another size, or ids that the tokenizer does not
            have.
    """
    size, width = path.stat().st_size, 4 if path.suffix.lower() == ".u32" else 2
    if size == 0 or size % width:
        raise DataError(f"{path} has {size} bytes; expected uint{8 * width} token ids, {width} bytes each")
    ids = np.memmap(path, f"<u{width}", mode="r")
    _check_width(path, ids, len(tokenizer))
    ids = ids[:max_tokens]
    eos, ends = tokenizer.eos_token_id, []
    for first in range(0, len(ids), _SCAN):
        part = ids[first : first + _SCAN]
        if part.max() >= len(tokenizer):
            raise DataError(
                f"{path} holds token {part.max()}, but the tokenizer ends at {len(tokenizer) - 1}; wrong file?"
            )
        if eos is not None:
            ends.append(np.flatnonzero(part == eos) + first + 1)
    edges = np.unique(np.concatenate([[0], *ends, [len(ids)]]).astype(np.int64))
    return Documents.of_shard(ids, np.diff(edges))


def _check_width(path: Path, ids: np.ndarray, vocabulary: int) -> None:
    """Refuse wider integers, of which every second half would be read as a token of its own: 0, or hardly more."""
    width = 8 * ids.itemsize
    if bytes(ids[:4].tobytes()[:6]) == b"\x93NUMPY":
        raise DataError(f"{path} is an array of numpy's save; write the bare uint{width} ids with tofile")
    start = ids[: _SCAN // 256]
    if len(start) >= _LEAST and start[1::2].max() <= (vocabulary - 1) >> width and start[::2].any():
        wider = "uint32 ids are read from a file whose name ends in .u32" if width == 16 else "write uint32 ids"
        second = start[1::2].max() or "zero"
        raise DataError(
            f"{path}: every second uint{width} is {second}, so its integers are wider; {wider}, int64 must be converted"
        )


def tokens_file(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> Iterator[EncodedDocument]:
    """Read the documents of a file of token ids one by one, see `token_file`."""
    yield from token_file(path, tokenizer, max_tokens)
