"""How text becomes arrays: tokenise, hold some documents out, and lay the rest into sequences of one length."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from lolcats.config import DataConfig
from lolcats.data.sources import TOKEN_SUFFIXES, Record, find_files, iter_records
from lolcats.data.templates import Template, render
from lolcats.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 256  # records tokenised in one call: enough to keep the tokenizer's threads busy


@dataclass(frozen=True, eq=False)
class EncodedDocument:
    """One tokenised document: `ids` int32 [n] with n >= 1; its first `prompt_length` tokens are the prompt."""

    ids: np.ndarray
    prompt_length: int

    def cut(self, start: int, stop: int) -> "EncodedDocument":
        """Take the tokens from `start` up to `stop`; the prompt is what is left of it there."""
        ids = self.ids[start:stop]
        return EncodedDocument(ids, min(max(self.prompt_length - start, 0), len(ids)))


@dataclass(frozen=True, eq=False)
class PackedDataset:
    """S sequences of L tokens, as three arrays of shape [S, L].

    Attributes:
        ids: int32 token ids.
        loss_mask: bool, False on prompt tokens and padding (without prompt masking, count where `document >= 0`).
        document: int32 index of the document inside its sequence, counted from 0; -1 on padding.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    document: np.ndarray

    def __post_init__(self) -> None:
        """Refuse arrays that do not fit together, with `DataError`."""
        shapes = [array.shape for array in (self.ids, self.loss_mask, self.document)]
        if len(set(shapes)) > 1 or self.ids.ndim != 2:
            raise DataError(f"ids, loss_mask and document must have one shape [sequences, length], got {shapes}")

    def __len__(self) -> int:
        """Count the sequences, S."""
        return len(self.ids)

    def __getitem__(self, index: slice | np.ndarray) -> "PackedDataset":
        """Take some sequences, by a slice or an integer array, as a dataset of their own."""
        return PackedDataset(self.ids[index], self.loss_mask[index], self.document[index])


def encode(
    records: Iterable[Record], template: Template, tokenizer: "PreTrainedTokenizerBase", add_eos: bool = True
) -> Iterator[EncodedDocument]:
    """Render and tokenise records, in order; documents without a single token are left out.

    Each document begins with the tokenizer's begin token where the tokenizer itself would put one, and ends with its
    end token if `add_eos`; a rendered text that brings these tokens along keeps just its own.

    Raises:
        DataError: no end token to add, a record with a prompt under a slow tokenizer, or what `render` raises.
    """
    eos = tokenizer.eos_token_id
    if add_eos and eos is None:
        raise DataError("the tokenizer has no eos token to end documents with; set tokenizer.eos_token")
    begin = _begin_ids(tokenizer)
    end = [eos] if add_eos else []
    remaining = iter(records)
    while batch := [render(record, template, tokenizer) for record in islice(remaining, _BATCH)]:
        for ids, prompt_length in zip(*_tokenise(batch, tokenizer), strict=True):
            head = [] if ids[:1] == begin else begin
            tail = [] if ids[-1:] == end else end
            if ids or tail:
                prompt_length += len(head) if prompt_length else 0
                yield EncodedDocument(np.array([*head, *ids, *tail], np.int32), prompt_length)


def _tokenise(
    batch: Sequence[tuple[str, str]], tokenizer: "PreTrainedTokenizerBase"
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


def _begin_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if isinstance(bos, int) and tokenizer("a", verbose=False)["input_ids"][0] == bos else []


def tokens_file(
    path: Path, tokenizer: "PreTrainedTokenizerBase", max_tokens: int | None = None
) -> Iterator[EncodedDocument]:
    """Read a raw file of little-endian token ids; each end token closes a document.

    Args:
        path: the file, uint32 if its name ends in .u32, else uint16. Without an end token in it (or in the tokenizer)
            it is one document.
        tokenizer: the one that made the tokens.
        max_tokens: read at most this many from the beginning.

    Raises:
        DataError: an empty file, one cut inside a token, or ids that the tokenizer does not have.
    """
    size, width = path.stat().st_size, 4 if path.suffix == ".u32" else 2
    if size == 0 or size % width:
        raise DataError(f"{path} has {size} bytes; expected uint{8 * width} token ids, {width} bytes each")
    ids = np.fromfile(path, f"<u{width}", count=-1 if max_tokens is None else max_tokens)
    if ids.max() >= len(tokenizer):
        raise DataError(f"{path} holds token {ids.max()}, but the tokenizer ends at {len(tokenizer) - 1}; wrong file?")
    eos = tokenizer.eos_token_id
    ends = np.flatnonzero(ids == eos) + 1 if eos is not None else []
    for part in np.split(ids, ends):
        if len(part):
            yield EncodedDocument(part.astype(np.int32), 0)


def read_documents(
    sources: Sequence[str], template: Template, tokenizer: "PreTrainedTokenizerBase", max_tokens: int | None = None
) -> list[EncodedDocument]:
    """Tokenise whole sources, one after the other; with `max_tokens` the document that crosses it is cut there.

    Args:
        sources: what `iter_records` takes, and paths or globs of token files, which end in .u16, .u32 or .bin.
        template: how records become text, see `render`.
        tokenizer: a tokenizer with an end token.
        max_tokens: the cap on all sources together; None reads everything.

    Raises:
        DataError: a source that is missing, empty or broken, see `iter_records`, `encode` and `tokens_file`.
    """
    documents: list[EncodedDocument] = []
    total = 0
    for document in chain.from_iterable(_read_source(source, template, tokenizer, max_tokens) for source in sources):
        if max_tokens is not None:
            document = document.cut(0, max_tokens - total)
        documents.append(document)
        total += len(document.ids)
        if total == max_tokens:
            break
    return documents


def _read_source(
    source: str, template: Template, tokenizer: "PreTrainedTokenizerBase", max_tokens: int | None
) -> Iterator[EncodedDocument]:
    if source.endswith(TOKEN_SUFFIXES):
        for path in find_files(source, TOKEN_SUFFIXES):
            yield from tokens_file(path, tokenizer, max_tokens)
    else:
        yield from encode(iter_records(source), template, tokenizer)


def build_datasets(
    config: DataConfig, tokenizer: "PreTrainedTokenizerBase", seed: int
) -> tuple[PackedDataset, PackedDataset]:
    """Build (training, validation) sequences from separate documents, the same ones for the same seed.

    Documents are shuffled; the first ones are held out until they fill `config.validation_sequences`. Where that would
    take more than half of the tokens (one long text, say), the last document held out is divided instead: its end is
    validation and its beginning training. No token is in both.

    Raises:
        DataError: less than one training sequence is left, or what `read_documents` raises.
    """
    documents = read_documents(config.sources, config.template, tokenizer, config.max_tokens)
    length, count = config.sequence_length, config.validation_sequences
    total, held = sum(len(document.ids) for document in documents), count * length
    if total < held + length:
        raise DataError(
            f"data too small: {total} tokens, need {held + length} ({count} validation sequences and one to train on, "
            f"of {length} tokens); lower data.sequence_length or data.validation_sequences, or add data"
        )
    order = np.random.default_rng(seed).permutation(len(documents))
    training, validation = _hold_out([documents[index] for index in order], held)
    # Padding is masked, so any id of the vocabulary will do.
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
    train = pack(training, length, config.packing, pad_id)
    return train, pack(validation, length, config.packing, pad_id)[:count]


def _hold_out(documents: list[EncodedDocument], tokens: int) -> tuple[list[EncodedDocument], list[EncodedDocument]]:
    """Divide documents into (rest, held out), with at least `tokens` tokens held out."""
    ends = np.cumsum([len(document.ids) for document in documents])
    last = int(np.searchsorted(ends, tokens))
    held, rest = documents[: last + 1], documents[last + 1 :]
    spare = int(ends[last]) - tokens
    if 2 * ends[last] > ends[-1] and spare > 0:
        divided = held.pop()
        rest.append(divided.cut(0, spare))
        held.append(divided.cut(spare, len(divided.ids)))
    return rest, held


def pack(
    documents: Sequence[EncodedDocument], length: int, packing: Literal["stream", "documents"], pad_id: int
) -> PackedDataset:
    """Lay documents into sequences of `length` tokens.

    Args:
        documents: in the order in which they are laid.
        length: L, tokens a sequence.
        packing: "stream" joins everything, cuts it every L tokens and drops the rest. "documents" keeps each document
            in one sequence, the first with room for it (pieces of L if it is longer), and pads at the right.
        pad_id: the token id of padding.

    Raises:
        DataError: not enough tokens for one sequence of a stream, or no document.
    """
    total = sum(len(document.ids) for document in documents)
    if total < (length if packing == "stream" else 1):
        raise DataError(f"data too small: {total} tokens, need {length}; lower data.sequence_length")
    if packing == "documents":
        return _pack_documents(documents, length, pad_id)
    kept = total // length * length
    ids = np.concatenate([document.ids for document in documents])[:kept].reshape(-1, length)
    mask = np.concatenate([_response_mask(document) for document in documents])[:kept].reshape(-1, length)
    sizes = [len(document.ids) for document in documents]
    number = np.repeat(np.arange(len(documents), dtype=np.int32), sizes)[:kept].reshape(-1, length)
    return PackedDataset(ids, mask, number - number[:, :1])


def _pack_documents(documents: Sequence[EncodedDocument], length: int, pad_id: int) -> PackedDataset:
    pieces = [
        document.cut(start, start + length) for document in documents for start in range(0, len(document.ids), length)
    ]
    free = np.full(len(pieces), length)
    rows: list[int] = []
    opened = 0
    for piece in pieces:
        row = int(np.argmax(free[: opened + 1] >= len(piece.ids)))
        free[row] -= len(piece.ids)
        opened = max(opened, row + 1)
        rows.append(row)
    ids = np.full((opened, length), pad_id, np.int32)
    mask = np.zeros((opened, length), bool)
    number = np.full((opened, length), -1, np.int32)
    for piece, row in zip(pieces, rows, strict=True):
        start = int(np.count_nonzero(number[row] >= 0))
        place = slice(start, start + len(piece.ids))
        number[row, place] = number[row].max() + 1
        ids[row, place] = piece.ids
        mask[row, place] = _response_mask(piece)
    return PackedDataset(ids, mask, number)


def _response_mask(document: EncodedDocument) -> np.ndarray:
    return np.arange(len(document.ids)) >= document.prompt_length


def epoch_order(n: int, epoch: int, seed: int) -> np.ndarray:
    """Shuffle the numbers 0 .. n-1 (int64 [n]) for one epoch; the same for the same `n`, `epoch` and `seed`."""
    return np.random.default_rng([seed, epoch]).permutation(n)
