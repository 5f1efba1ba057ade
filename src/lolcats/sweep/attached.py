"""A process that ends when the one that started it does, even if that is killed and can tell nobody.

The starting process keeps the writing end of a pipe, whose reading end is the standard input here. Nothing is written
to it; when the process that holds the other end is gone, however it ended, the system closes the pipe.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO


def start_attached(
    command: list[str], *, stdout: IO[bytes] | int, stderr: int | None = None, env: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """`subprocess.Popen` of a process that calls `end_with_parent`, in a group of its own with those that it starts."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=stdout, stderr=stderr, env=env, start_new_session=True)


def end_with_parent() -> None:
    """End this process and its own as soon as the one that started it has ended. Standard input is empty afterwards."""
    pipe = os.dup(sys.stdin.fileno())  # a copy that processes started from here do not have
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)
    threading.Thread(target=_watch, args=(pipe,), name="lolcats-parent", daemon=True).start()


def finish(process: subprocess.Popen[bytes]) -> None:
    """End at once what is left of an attached process and of those that it started, and forget them."""
    if os.name == "posix":
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _watch(pipe: int) -> None:
    while os.read(pipe, 4096):
        pass
    # At once: a run loses what came after its last checkpoint, and beside a process that is still about to end the
    # next call of the sweep could not start it again.
    if os.name == "posix" and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
