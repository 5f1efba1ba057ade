"""How the processes of one run learn that one of them has failed: a key in a store that all of them read.

A thread of each process looks every half second. A process that fails writes why; one that is killed cannot, so those
of its machine write it for it. Whoever reads it prints it and ends at once: its main thread may wait for the failed one
inside a library, where no exception of Python reaches it. How the processes find this store: process_meeting.py.

The store lives in the main process, and a question to a store that is gone takes minutes to fail. So a second thread
only looks whether the main process is there.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 5.0
"""How long the main process, in which the store lives, waits until the others have read why it ends."""
ANSWER_SECONDS = 10
"""How long the store may take to answer."""
FAILED, DONE, READ = "failed", "done", "read"
KILLED = "process {} ended without a word: it was killed, perhaps for want of memory"
_KILLED = f"{FAILED} {KILLED}"
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class ProcessWatch:
    """Looks at the other processes until `stop`.

    Args:
        store: what they share.
        rank: of this process.
        places: `own_place` of all processes.
        meeting: the store through which they met, which the others may still read while this process is watched.
    """

    def __init__(self, store: TCPStore, rank: int, places: Sequence[str], meeting: TCPStore | None = None) -> None:
        self.store, self.rank, self.places, self.meeting = store, rank, places, meeting
        self._ending = threading.Event()
        store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
        looks = [self._watch, self._watch_main][: 2 if rank else 1]
        self._threads = [threading.Thread(target=look, name="lolcats-processes", daemon=True) for look in looks]
        for thread in self._threads:
            thread.start()

    def done(self) -> None:
        """This process has done its part: from here on it may end."""
        self._ending.set()
        self.store.set(f"{DONE}{self.rank}", "1")

    def stop(self) -> None:
        """Look no more."""
        self._ending.set()
        for thread in self._threads:
            thread.join(ANSWER_SECONDS)

    def tell(self, error: BaseException, text: str) -> str | None:
        """Let the others know that this process ends.

        Returns:
            What ended another process before, where `error` is but its consequence here; else None.
        """
        self.stop()
        reason = self._consequence_of(error)
        with suppress(RuntimeError):  # the store ends with the main process
            if reason is None:
                kind = "interrupted" if isinstance(error, KeyboardInterrupt) else FAILED
                self._post(f"{kind} process {self.rank}: {text}")
            self._acknowledge()
        return reason

    def _watch(self) -> None:
        while not self._ending.wait(POLL_SECONDS):
            try:
                message = self._message()
            except RuntimeError:
                message = _KILLED.format(0)
            if message is not None and not self._ending.is_set():
                self._end(message)

    def _message(self) -> str | None:
        """Why a process has ended, None while all live."""
        if not lives(self.places[0]):
            return _KILLED.format(0)
        if self.store.check([FAILED]):
            return self.store.get(FAILED).decode()
        for rank, place in enumerate(self.places):
            if not lives(place) and not self.store.check([f"{DONE}{rank}"]):
                self._post(_KILLED.format(rank))
                return self.store.get(FAILED).decode()
        return None

    def _watch_main(self) -> None:
        while not self._ending.wait(POLL_SECONDS):
            if not lives(self.places[0]):  # it may not end before this process is done
                self._end(_KILLED.format(0))

    def _consequence_of(self, error: BaseException) -> str | None:
        """The reason of another process, if this process's `error` may be due to it."""
        if not isinstance(error, RuntimeError):
            return None
        deadline = time.monotonic() + 2 * POLL_SECONDS
        while time.monotonic() < deadline:
            with suppress(RuntimeError):  # the store is gone: its process has ended, or will be seen to end soon
                if (message := self._message()) is not None:
                    return message.partition(" ")[2]
            time.sleep(POLL_SECONDS / 5)
        return None

    def _post(self, message: str) -> None:
        """Write why all end; the first message stays."""
        self.store.compare_set(FAILED, "", message)

    def _acknowledge(self) -> None:
        """Say that this process knows; the main one waits for the others, which could read nothing without it."""
        count = self.store.add(READ, 1)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.rank == 0 and count < len(self.places) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 5)
            count = self.store.add(READ, 0)

    def _end(self, message: str) -> None:
        with suppress(RuntimeError):
            if lives(self.places[0]):
                self._acknowledge()
        kind, _, text = message.partition(" ")
        prefix = f"[process {self.rank}] " if self.rank else ""
        line = "interrupted" if kind == "interrupted" else f"error: {text}"
        with suppress(OSError):
            if sys.stdout.isatty():
                print("\x1b[?25h", end="", flush=True)  # a progress bar had hidden the cursor
            print(f"{prefix}{line}", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED if kind == "interrupted" else 1)


def own_place() -> str:
    """Where this process is: its machine and its number there."""
    return f"{_machine()} {os.getpid()}"


def _machine() -> str:
    """This machine, or the container whose process numbers these are."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()}{space}"


def lives(place: str) -> bool:
    """Whether the process at a place still runs; one that has ended but was not yet waited for does not.

    Of other machines nobody can say: theirs live.
    """
    machine, _, number = place.rpartition(" ")
    if machine != _machine():
        return True
    try:
        process = int(number)
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except (OSError, IndexError):
        return True  # it cannot be asked
    return state not in ("Z", "X")
