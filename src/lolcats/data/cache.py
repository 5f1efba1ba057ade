"""Tokens on disk: written once in shards, mapped into memory ever after.

CACHE/tokens/KEY/index.json   what the tokens depend on, and the shards in order, each with sizes and checksums
                 00000.bin    tokens, little-endian uint16 or uint32
                 00000.npy    int64 [documents, 2]: tokens of a document, and how many of them are its prompt

A shard is listed only after its files are whole, with the number of records read until then. So the state of a folder
after any interruption is a correct beginning, and reading goes on behind it.
"""

from __future__ import annotations

import io
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lolcats.data.documents import Documents, EncodedDocument
from lolcats.errors import DataError, LolcatsError
from lolcats.files import cache_root, write_bytes, write_text
from lolcats.identity import digest

VERSION = 2  # 2: copies of the hub are read by configuration and split; what is beside a conversation counts
SHARD_TOKENS = 1 << 24
SHARD_SECONDS = 60.0  # no more work than this is lost when the process is killed

Batches = Iterator[tuple[int, list[EncodedDocument]]]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder of the cache and hold it alone; other processes wait, then find what this one made.

    Raises:
        DataError: it cannot be written.
    """
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire()
    except OSError as error:
        raise DataError(
            f"cannot write the cache {folder}: {error.strerror or error}; set LOLCATS_CACHE=FOLDER"
        ) from error
    try:
        yield
    finally:
        lock.release()


class TokenCache:
    """The tokens of one source under one tokenizer and template.

    Args:
        identity: a JSON value that is equal only where the tokens would be.
        wide: whether ids need 32 bits.
    """

    def __init__(self, identity: dict[str, Any], wide: bool) -> None:
        self.identity = json.loads(json.dumps({"version": VERSION, **identity}))
        self.folder = cache_root() / "tokens" / digest(self.identity)
        self.dtype = "<u4" if wide else "<u2"
        self.index_file = self.folder / "index.json"
        self.shards: list[dict[str, Any]] = []
        self.tables: list[np.ndarray] = []
        """Of each shard: int64 [documents, 2], tokens and prompt tokens."""
        self.complete = False
        self.damaged = ""
        """What was found wrong in the folder and is made again, "" if nothing was."""

    @property
    def tokens(self) -> int:
        """Tokens on disk."""
        return sum(shard["tokens"] for shard in self.shards)

    @property
    def records(self) -> int:
        """Records of the source that were read for them."""
        return self.shards[-1]["records"] if self.shards else 0

    def read(
        self, produce: Callable[[int], Batches], cap: int | None, tell: Callable[[int, int], None] = lambda *_: None
    ) -> Documents:
        """Map the documents of the source, after tokenising those that are not on disk yet.

        Args:
            produce: given a number of records to skip, yields batches: records read, and their documents.
            cap: stop when so many tokens are there (what is on disk already may be more); None reads everything.
            tell: called with (records, tokens) as they grow.

        Raises:
            DataError: the folder cannot be written, or what `produce` raises; what was done until then is kept.
        """
        self._load(trusting=True)
        if not self._enough(cap):
            with locked(self.folder):
                self._load(trusting=False)
                if self._enough(cap):
                    self._write([], self.records)  # the times of a copied folder
                else:
                    self._extend(produce, cap, tell)
        return self._map()

    def _enough(self, cap: int | None) -> bool:
        return self.complete or (cap is not None and self.tokens >= cap)

    def _load(self, trusting: bool) -> None:
        """Take the shards that are whole, up to the first that is not.

        Args:
            trusting: without the lock nothing is repaired, and a file that was touched counts as broken; with it, its
                checksum decides.
        """
        self.shards, self.tables, self.complete = [], [], False
        if not self.index_file.is_file():
            return
        try:
            index = json.loads(self.index_file.read_text(encoding="utf-8"))
            known = list(index["shards"]) if index["identity"] == self.identity else []
            self.damaged = "" if known or index["identity"] == self.identity else "its index is of other text"
            for shard in known:
                if trouble := self._trouble(shard, trusting):
                    self.damaged = trouble
                    break
                self.tables.append(self._table(shard))
                self.shards.append(shard)
            self.complete = bool(index["complete"]) and not self.damaged
        except Exception:  # whatever a damaged file makes of being read: it is made again
            self.shards, self.tables, self.complete = [], [], False
            self.damaged = "its index or a table of documents cannot be read"

    def _trouble(self, shard: dict[str, Any], trusting: bool) -> str:
        """What is wrong with the files of a shard, "" if nothing is."""
        for name, facts in shard["files"].items():
            path = self.folder / name
            if not path.is_file():
                return f"{name} is missing"
            state = path.stat()
            if state.st_size != facts["size"]:
                return f"{name} has {state.st_size} bytes instead of {facts['size']}"
            if state.st_mtime_ns == facts["mtime_ns"]:
                continue
            if trusting or _checksum(path) != facts["crc32"]:
                return f"{name} was changed"
            facts["mtime_ns"] = state.st_mtime_ns  # a copy of the folder: right content, another time
        return ""

    def _table(self, shard: dict[str, Any]) -> np.ndarray:
        """The documents of a shard; raises ValueError where they are not those of its tokens."""
        tokens, table = shard["files"]
        columns = np.load(self.folder / table, allow_pickle=False)
        held = shard["files"][tokens]["size"] // np.dtype(self.dtype).itemsize
        fits = columns.shape == (shard["documents"], 2) and columns.dtype == np.int64 and columns.min(initial=0) >= 0
        if not fits or not isinstance(shard["records"], int) or not int(columns[:, 0].sum()) == held == shard["tokens"]:
            raise ValueError("the table of documents does not fit the tokens")
        return columns

    def _extend(self, produce: Callable[[int], Batches], cap: int | None, tell: Callable[[int, int], None]) -> None:
        self._drop_strays()
        records, tokens = self.records, self.tokens
        waiting: list[EncodedDocument] = []
        held, since = 0, time.monotonic()
        try:
            for count, documents in produce(records):
                records += count
                waiting += documents
                held += sum(len(document.ids) for document in documents)
                tell(records, tokens + held)
                full = held >= SHARD_TOKENS or time.monotonic() - since > SHARD_SECONDS
                enough = cap is not None and tokens + held >= cap
                if full or enough:
                    self._write(waiting, records)
                    waiting, tokens, held, since = [], tokens + held, 0, time.monotonic()
                if enough:
                    return
            self.complete = True
        finally:
            # Also after Ctrl-C or a broken record: nothing is tokenised twice.
            if waiting or self.complete:
                self._write(waiting, records)

    def _write(self, documents: list[EncodedDocument], records: int) -> None:
        """Add a shard (none for no documents) and list it."""
        try:
            if documents:
                number = f"{len(self.shards):05}"
                ids = np.concatenate([document.ids for document in documents]).astype(self.dtype)
                table = np.array([(len(d.ids), d.prompt_length) for d in documents], np.int64)
                files = {f"{number}.bin": _write_bytes(self.folder / f"{number}.bin", ids.tobytes())}
                files[f"{number}.npy"] = _write_bytes(self.folder / f"{number}.npy", _npy(table))
                self.shards.append({"files": files, "tokens": len(ids), "documents": len(table), "records": records})
                self.tables.append(table)
            index = {"identity": self.identity, "complete": self.complete, "shards": self.shards}
            write_text(self.index_file, json.dumps(index, indent=1) + "\n")
        except LolcatsError as error:
            raise DataError(f"the cache: {error}; set LOLCATS_CACHE=FOLDER to have it elsewhere") from error

    def _drop_strays(self) -> None:
        listed = {name for shard in self.shards for name in shard["files"]}
        for path in [*self.folder.glob("*.bin"), *self.folder.glob("*.npy"), *self.folder.glob("*.tmp")]:
            if path.name in listed:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _map(self) -> Documents:
        parts = []
        for shard, columns in zip(self.shards, self.tables, strict=True):
            tokens, _ = shard["files"]
            ids = np.memmap(self.folder / tokens, self.dtype, mode="r")
            parts.append(Documents.of_shard(ids, columns[:, 0], columns[:, 1]))
        return Documents.join(parts)


def _npy(table: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, table)
    return file.getvalue()


def _write_bytes(path: Path, content: bytes) -> dict[str, int]:
    """Write a file atomically; returns size, time and checksum for the index."""
    write_bytes(path, content)
    state = path.stat()
    return {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "crc32": zlib.crc32(content)}


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value
