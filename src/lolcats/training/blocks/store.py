"""Hidden states at one boundary between blocks of layers, on disk: one job writes them, the next one reads them.

Each step is a file of its own in a folder, whole or not there. So a reader may follow a writer that is still at work,
on this machine or on another that shares the file system, and a step can be deleted as soon as it has been used.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lolcats.errors import LolcatsError
from lolcats.files import remove_leftovers_in
from lolcats.training.blocks.state_file import has_states, read_states, write_states

POLL = 0.05
"""Seconds between two looks for a file that is not there yet."""
REMEDY = "delete it and run the job that writes it again"
_KEY = re.compile(r"[a-z]+-[0-9]+")


def disk_bytes(tokens: int, d_model: int, dtype: torch.dtype, boundaries: int, validation_tokens: int = 0) -> int:
    """Bytes of the hidden states of `boundaries` boundaries on the disk, but for headers of some KB a step.

    Args:
        tokens: that are trained on, each as often as it is read.
        d_model: numbers that a token has between layers.
        dtype: of these.
        boundaries: that are kept at the same time.
        validation_tokens: of the validation text.
    """
    return (tokens + validation_tokens) * d_model * dtype.itemsize * boundaries


class HiddenStore:
    """Tensors of steps by key, such as "train-000017" or "validation-000".

    It is a context manager; at its end, or by `close`, all is on the disk. What killed writers of this machine left
    half written is removed at the beginning.

    Args:
        folder: of one boundary; it is made.
        identity: what the tensors depend on, as JSON: `model`, `data`, `settings` and `boundary`. A file that says
            otherwise is refused.
        ahead: steps that may wait in memory to be written, and as many that may be read before they are asked for.
        remedy: how a file is made again, for messages.

    Raises:
        LolcatsError: the folder cannot be made.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, ahead: int = 4, remedy: str = REMEDY) -> None:
        assert ahead > 0
        self.folder, self.identity, self.remedy = folder, identity, remedy
        self._slots = threading.Semaphore(ahead)
        self._failed: BaseException | None = None
        self._queued: set[str] = set()
        self._writing = ThreadPoolExecutor(1, "hidden-states-write")
        self._reading = _Ahead(self._read, lambda key: self._path(key).exists(), ahead)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers_in(folder)
        except OSError as error:
            raise LolcatsError(f"cannot write {folder}: {error.strerror or error}") from error

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors of any device to this machine's memory, and let a thread write them.

        Waits while `ahead` others wait. They may be changed when this returns.

        Raises:
            LolcatsError: an earlier step could not be written (the disk is full, say); nothing is written after it.
        """
        path = self._path(key)
        self._slots.acquire()
        try:
            self._raise_failed()
            held = {name: _begin_copy(t.detach()) for name, t in tensors.items()}
            copied = [torch.cuda.current_stream(t.device).record_event() for t in tensors.values() if t.is_cuda]
            self._queued.add(key)
            self._writing.submit(self._write, path, key, held, copied)
        except BaseException:
            self._slots.release()
            raise

    def read(self, key: str, *, wait: float = 0.0) -> dict[str, Tensor]:
        """The tensors of a step, in this machine's memory, every byte checked.

        Args:
            key: of the step.
            wait: seconds that it may take until its writer has written it.

        Raises:
            LolcatsError: it is not there after that time, is damaged, or is of another identity.
        """
        begun = time.monotonic()
        while (found := self._reading.take(key) or self._read_if_there(key)) is None:
            if time.monotonic() - begun >= wait:
                raise LolcatsError(f"{self._path(key)} is not there after {wait:g} seconds of waiting; {self.remedy}")
            time.sleep(min(POLL, wait))
            os.scandir(self.folder).close()  # a shared file system looks again for names that it did not find
        return found

    def prefetch(self, keys: Iterable[str]) -> None:
        """Let a thread read these steps, in their order, as soon as they are written; `read` finds them in memory."""
        self._reading.add(keys)

    def has(self, key: str) -> bool:
        """Whether a step waits to be written, or is on the disk with a sound header and its whole length.

        Raises:
            LolcatsError: it is of another identity.
        """
        return key in self._queued or has_states(self._path(key), key, self.identity, self.remedy)

    def drop(self, key: str) -> None:
        """Delete a step from the disk; it need not be there.

        Raises:
            LolcatsError: it cannot be deleted.
        """
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise LolcatsError(f"cannot delete {self._path(key)}: {error.strerror or error}") from error

    def flush(self) -> None:
        """Wait until all steps are on the disk; raises as `write` does."""
        self._writing.submit(lambda: None).result()
        self._raise_failed()

    def close(self) -> None:
        """Wait until all steps are on the disk, and end the threads; raises as `write` does."""
        self._reading.close()
        self._writing.shutdown()
        self._raise_failed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # what went wrong first is what the caller must see
            self._reading.close()
            self._writing.shutdown()

    def _path(self, key: str) -> Path:
        assert _KEY.fullmatch(key), key
        return self.folder / f"{key}.safetensors"

    def _write(self, path: Path, key: str, tensors: dict[str, Tensor], copied: Sequence[torch.Event]) -> None:
        try:
            for event in copied:
                event.synchronize()
            if self._failed is None:
                write_states(path, key, self.identity, tensors)
        except BaseException as error:
            self._failed = error
        finally:
            self._queued.discard(key)
            self._slots.release()

    def _raise_failed(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _read(self, key: str) -> dict[str, Tensor]:
        return read_states(self._path(key), key, self.identity, self.remedy)

    def _read_if_there(self, key: str) -> dict[str, Tensor] | None:
        try:
            return self._read(key)
        except FileNotFoundError:
            return None


def _begin_copy(tensor: Tensor) -> Tensor:
    """A copy in this machine's memory. From a GPU it goes on by itself, into memory that is pinned and used again."""
    return tensor.contiguous().to("cpu", non_blocking=True, copy=True)


class _Ahead:
    """A thread that reads keys in their order, and keeps at most `ahead` results that nobody took yet."""

    def __init__(self, read: Callable[[str], dict[str, Tensor]], exists: Callable[[str], bool], ahead: int) -> None:
        self.read, self.exists, self.ahead = read, exists, ahead
        self.wanted: OrderedDict[str, None] = OrderedDict()  # of tens of thousands of keys
        self.reading: str | None = None
        self.ready: dict[str, dict[str, Tensor] | Exception] = {}
        self.changed = threading.Condition()
        self.closed = False
        self.thread: threading.Thread | None = None

    def add(self, keys: Iterable[str]) -> None:
        with self.changed:
            self.wanted.update((key, None) for key in keys if key != self.reading and key not in self.ready)
            if self.thread is None and self.wanted:
                self.thread = threading.Thread(target=self._run, name="hidden-states-read", daemon=True)
                self.thread.start()
            self.changed.notify_all()

    def take(self, key: str) -> dict[str, Tensor] | None:
        """What was read for a key; None: it was not, and will not be.

        Raises:
            Exception: what reading it raised.
        """
        with self.changed:
            if key in self.wanted:  # it has not begun, and may never: results that come later hold all the places
                del self.wanted[key]
                return None
            self.changed.wait_for(lambda: self.reading != key)
            found = self.ready.pop(key, None)
            self.changed.notify_all()
        if isinstance(found, FileNotFoundError):  # it was deleted meanwhile
            return None
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        if self.thread is not None:
            self.thread.join()
        self.ready.clear()

    def _run(self) -> None:
        while (key := self._next()) is not None:
            try:
                found: dict[str, Tensor] | Exception = self.read(key)
            except Exception as error:
                found = error
            with self.changed:
                self.reading, self.ready[key] = None, found
                self.changed.notify_all()

    def _next(self) -> str | None:
        """The next key that can be read, when there is a place for it; None at the end."""
        with self.changed:
            while not self.closed:
                waiting = bool(self.wanted) and len(self.ready) < self.ahead
                if waiting and self.exists(next(iter(self.wanted))):
                    self.reading, _ = self.wanted.popitem(last=False)
                    return self.reading
                self.changed.wait(POLL if waiting else None)
        return None
