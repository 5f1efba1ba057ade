"""Tokenised documents: one by one, and as a table over arrays that may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np


@dataclass(frozen=True, eq=False)
class EncodedDocument:
    """One tokenised document: `ids` int32 [n] with n >= 1; its first `prompt_length` tokens are the prompt."""

    ids: np.ndarray
    prompt_length: int

    def cut(self, start: int, stop: int) -> EncodedDocument:
        """Take the tokens from `start` up to `stop`; the prompt is what is left of it there."""
        ids = self.ids[start:stop]
        return EncodedDocument(ids, min(max(self.prompt_length - start, 0), len(ids)))


@dataclass(frozen=True, eq=False)
class Documents(Sequence[EncodedDocument]):
    """D documents as places in shards of tokens; their tokens are read when they are asked for.

    Attributes:
        shards: integer arrays [tokens], in memory or mapped from files.
        shard: int32 [D], the shard in which a document lies.
        start: int64 [D], where it begins there.
        length: int64 [D], its tokens, at least 1.
        prompt: int64 [D], how many of them are the prompt.
    """

    shards: tuple[np.ndarray, ...]
    shard: np.ndarray
    start: np.ndarray
    length: np.ndarray
    prompt: np.ndarray

    @classmethod
    def of_shard(cls, tokens: np.ndarray, length: np.ndarray, prompt: np.ndarray | None = None) -> Documents:
        """Documents that lie one after the other from the beginning of one array."""
        length = np.asarray(length, np.int64)
        prompt = np.zeros_like(length) if prompt is None else np.asarray(prompt, np.int64)
        return cls((tokens,), np.zeros(len(length), np.int32), np.cumsum(length) - length, length, prompt)

    @classmethod
    def of(cls, documents: Iterable[EncodedDocument]) -> Documents:
        """Documents in memory."""
        documents = list(documents)
        ids = np.concatenate([document.ids for document in documents]) if documents else np.zeros(0, np.int32)
        prompt = np.array([document.prompt_length for document in documents], np.int64)
        return cls.of_shard(ids, np.array([len(document.ids) for document in documents], np.int64), prompt)

    @classmethod
    def join(cls, parts: Sequence[Documents]) -> Documents:
        """All documents of `parts`, in order."""
        if not parts:
            return cls.of([])
        before = np.cumsum([0, *(len(part.shards) for part in parts)])
        shard = np.concatenate([part.shard + before[i] for i, part in enumerate(parts)]).astype(np.int32)
        columns = [np.concatenate([getattr(part, name) for part in parts]) for name in ("start", "length", "prompt")]
        return cls(tuple(shard for part in parts for shard in part.shards), shard, *columns)

    @property
    def tokens(self) -> int:
        """Tokens of all documents together."""
        return int(self.length.sum())

    def __len__(self) -> int:
        """Count the documents, D."""
        return len(self.length)

    @overload
    def __getitem__(self, index: int) -> EncodedDocument: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> Documents: ...
    def __getitem__(self, index: int | slice | np.ndarray) -> EncodedDocument | Documents:
        """Read one document, or choose some without reading them."""
        if isinstance(index, slice | np.ndarray):
            columns = (column[index] for column in (self.shard, self.start, self.length, self.prompt))
            return Documents(self.shards, *columns)
        return EncodedDocument(self.read(index, 0, int(self.length[index])), int(self.prompt[index]))

    def __iter__(self) -> Iterator[EncodedDocument]:
        """Read the documents one after the other."""
        return (self[index] for index in range(len(self)))

    def read(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` up to `stop` of a document, int32."""
        first = int(self.start[index])
        return self.shards[self.shard[index]][first + start : first + stop].astype(np.int32)

    def split(self, tokens: int) -> tuple[Documents, Documents]:
        """Divide before token number `tokens`; a document that crosses it is divided too."""
        ends = np.cumsum(self.length)
        last = int(np.searchsorted(ends, tokens))
        if last == len(self):
            return self, self[last:]
        inside = tokens - int(ends[last] - self.length[last])
        if inside == 0 or inside == self.length[last]:
            last += inside > 0
            return self[:last], self[last:]
        head, tail = self[: last + 1], self[last:]
        return head._edited(-1, 0, inside), tail._edited(0, inside, int(self.length[last]))

    def _edited(self, index: int, start: int, stop: int) -> Documents:
        """The same with one document cut."""
        columns = [column.copy() for column in (self.start, self.length, self.prompt)]
        columns[0][index] += start
        columns[1][index] = stop - start
        columns[2][index] = min(max(int(columns[2][index]) - start, 0), stop - start)
        return Documents(self.shards, self.shard, *columns)
