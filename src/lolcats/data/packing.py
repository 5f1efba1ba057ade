"""How documents are laid into sequences of one length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from lolcats.data.documents import Documents
from lolcats.data.documents import EncodedDocument as EncodedDocument
from lolcats.data.encoding import encode as encode
from lolcats.data.encoding import tokens_file as tokens_file
from lolcats.data.reading import read_documents as read_documents
from lolcats.errors import DataError

IN_MEMORY = 1 << 24  # tokens: what is smaller is read at once, so that training never waits for a disk
_BLOCK = 512  # sequences whose free places are looked through together

Span = tuple[int, int, int, int, int]  # column in the sequence, document, its first token there, tokens, its number


@dataclass(frozen=True, eq=False)
class PackedDataset:
    """S sequences of L tokens, as three arrays of shape [S, L].

    Attributes:
        ids: int32 token ids. Of large data all three are `Rows`, which read from disk what is asked for.
        loss_mask: bool, False on prompt tokens and padding (without prompt masking, count where `document >= 0`).
        document: int32 index of the document inside its sequence, counted from 0; -1 on padding.
        follows: bool [S], whether a sequence goes on where the one before it ended, in one document that fills both;
            None where that is not known.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    document: np.ndarray
    follows: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Refuse arrays that do not fit together, with `DataError`."""
        shapes = [array.shape for array in (self.ids, self.loss_mask, self.document)]
        if len(set(shapes)) > 1 or self.ids.ndim != 2:
            raise DataError(f"ids, loss_mask and document must have one shape [sequences, length], got {shapes}")
        if self.follows is not None and self.follows.shape != shapes[0][:1]:
            raise DataError(
                f"follows must have the shape [{shapes[0][0]}], one for each sequence, got {self.follows.shape}"
            )

    def __len__(self) -> int:
        """Count the sequences, S."""
        return len(self.ids)

    def __getitem__(self, index: slice | np.ndarray) -> PackedDataset:
        """Take some sequences, by a slice or an integer array, as a dataset of their own."""
        follows = None  # neighbours in another order do not belong together
        if self.follows is not None and isinstance(index, slice) and index.step in (None, 1):
            follows = self.follows[index]
        return PackedDataset(self.ids[index], self.loss_mask[index], self.document[index], follows)


def pack(
    documents: Sequence[EncodedDocument] | Documents, length: int, packing: Literal["stream", "documents"], pad_id: int
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
    documents = documents if isinstance(documents, Documents) else Documents.of(documents)
    if documents.tokens < (length if packing == "stream" else 1):
        raise DataError(f"data too small: {documents.tokens} tokens, need {length}; lower data.sequence_length")
    layout = _Stream(documents, length) if packing == "stream" else _Whole(documents, length)
    fields = [Rows(documents, layout, length, fill) for fill in (pad_id, False, -1)]
    packed = PackedDataset(*(cast(np.ndarray, rows) for rows in fields), follows=layout.follows())
    return packed[:] if len(packed) * length <= IN_MEMORY else packed


class Rows:
    """One field of a packed dataset, [S, L], gathered from the documents when it is indexed by sequence.

    Args:
        documents: where tokens lie.
        layout: which pieces of them make a sequence.
        fill: the value of padding; its kind says which field this is: a token id (int >= 0), False for the loss mask,
            or -1 for the number of the document.
    """

    ndim = 2

    def __init__(self, documents: Documents, layout: _Stream | _Whole, length: int, fill: int) -> None:
        self.documents, self.layout, self.fill = documents, layout, fill
        self.shape = (layout.sequences, length)
        self.dtype = np.dtype(bool if fill is False else np.int32)

    def __len__(self) -> int:
        """Count the sequences, S."""
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read sequences: by a slice or integers [n], [n, L]; by one integer, [L]."""
        if isinstance(index, int | np.integer):
            return self[np.array([index])][0]
        rows = np.arange(len(self))[index]
        out = np.full((len(rows), self.shape[1]), self.fill, self.dtype)
        for place, row in enumerate(rows):
            for column, document, start, tokens, number in self.layout.spans(int(row)):
                out[place, column : column + tokens] = self._piece(document, start, tokens, number)
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read everything."""
        return self[:] if dtype is None else self[:].astype(dtype)

    def _piece(self, document: int, start: int, tokens: int, number: int) -> np.ndarray | int:
        if self.fill is False:
            return np.arange(start, start + tokens) >= self.documents.prompt[document]
        return number if self.fill == -1 else self.documents.read(document, start, start + tokens)


class _Stream:
    """All documents end to end, cut every `length` tokens; the rest at the end is dropped."""

    def __init__(self, documents: Documents, length: int) -> None:
        self.ends = np.cumsum(documents.length)
        self.starts = self.ends - documents.length
        self.length, self.sequences = length, documents.tokens // length

    def spans(self, row: int) -> Iterator[Span]:
        """The pieces of sequence `row`."""
        first, last = row * self.length, (row + 1) * self.length
        begin = int(np.searchsorted(self.ends, first, "right"))
        end = int(np.searchsorted(self.ends, last, "left"))
        for document in range(begin, end + 1):
            start = max(first, int(self.starts[document]))
            tokens = min(last, int(self.ends[document])) - start
            yield start - first, document, start - int(self.starts[document]), tokens, document - begin

    def follows(self) -> np.ndarray:
        """See `PackedDataset.follows`."""
        first = np.arange(self.sequences) * self.length
        begin = np.searchsorted(self.ends, first, "right")
        return _goes_on(begin, begin == np.searchsorted(self.ends, first + self.length, "left"))


class _Whole:
    """Each document in the first sequence with room for it."""

    def __init__(self, documents: Documents, length: int) -> None:
        self.length = length
        pieces = -(-documents.length // length)
        self.document = np.repeat(np.arange(len(documents)), pieces)
        self.start = (np.arange(len(self.document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * length
        self.tokens = np.minimum(documents.length[self.document] - self.start, length)
        row = _first_fit(self.tokens, length)
        order = np.argsort(row, kind="stable")
        self.document, self.start, self.tokens = self.document[order], self.start[order], self.tokens[order]
        self.sequences = int(row.max()) + 1
        self.edges = np.searchsorted(row[order], np.arange(self.sequences + 1))

    def spans(self, row: int) -> Iterator[Span]:
        """The pieces of sequence `row`."""
        column = 0
        for number, index in enumerate(range(int(self.edges[row]), int(self.edges[row + 1]))):
            tokens = int(self.tokens[index])
            yield column, int(self.document[index]), int(self.start[index]), tokens, number
            column += tokens

    def follows(self) -> np.ndarray:
        """See `PackedDataset.follows`; the full pieces of a document lie in a row, each in the first empty sequence."""
        first = self.edges[:-1]
        return _goes_on(self.document[first], self.tokens[first] == self.length)


def _goes_on(document: np.ndarray, fills: np.ndarray) -> np.ndarray:
    """Whether each sequence [S] and the one before it are filled by the same document."""
    found = np.zeros(len(document), bool)
    found[1:] = fills[1:] & fills[:-1] & (document[1:] == document[:-1])
    return found


def _first_fit(tokens: np.ndarray, length: int) -> np.ndarray:
    """The sequence of each piece, int64: the first with `tokens` free places left, looked for block by block."""
    blocks = -(-len(tokens) // _BLOCK)
    free = np.full((blocks, _BLOCK), length)
    most = np.full(blocks, length)
    rows = np.empty(len(tokens), np.int64)
    for index, need in enumerate(tokens):
        block = int(np.argmax(most >= need))
        place = int(np.argmax(free[block] >= need))
        free[block, place] -= need
        most[block] = free[block].max()
        rows[index] = block * _BLOCK + place
    return rows


def long_texts(data: PackedDataset, chunks: int) -> np.ndarray:
    """Where sequences that go on in one document make texts of `chunks` of them.

    Returns:
        int64 [texts], the first sequence of each; none is in two texts.
    """
    if data.follows is None:
        return np.zeros(0, np.int64)
    starts = np.flatnonzero(~np.concatenate([[False], data.follows[1:]]))
    counts = np.diff(np.append(starts, len(data))) // chunks
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(starts, counts) + number * chunks


def epoch_order(n: int, epoch: int, seed: int) -> np.ndarray:
    """Shuffle the numbers 0 .. n-1 (int64 [n]) for one epoch; the same for the same `n`, `epoch` and `seed`."""
    return np.random.default_rng([seed, epoch]).permutation(n)
