"""Processes that run commands of lolcats, and what befalls them: a kill, a full disk, a second one of the same kind.

They are forked from one that has imported everything: a start then takes no time, so faults fall into the work.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lolcats.cli import main

WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}
LIMIT = 60.0
"""Seconds within which all processes of a command end after a fault."""
Together = Literal["ranks", "torchrun", "jobs"]


@dataclass
class Command:
    """What is run at once.

    Args:
        words: command line of each process.
        again: command lines that go on after a fault; the same where there are none.
        together: how several processes belong together. "ranks" end by themselves when one of them fails; those of
            "torchrun" are ended by its agent; "jobs" know of each other by files alone, and one that was killed is
            started again at once, as a queue does.
    """

    words: list[list[str]]
    again: list[list[str]] | None = None
    together: Together = "jobs"
    seconds: float = 0.0
    """That an undisturbed run takes."""
    events: list[int] = field(default_factory=list)
    """Changes to files of each process in an undisturbed run."""


@dataclass
class Fault:
    """What befalls some of the processes, after a time or at a change to a file."""

    kind: Literal["kill", "full disk", "twice"]
    processes: list[int]
    seconds: float | None = None
    event: int | None = None


@dataclass
class Outcome:
    codes: list[int]
    """Exit code of each process in its last start; negative: the signal that ended it."""
    seconds: float
    said: str
    """What all of them wrote."""
    killed: bool = False
    """Whether the fault killed somebody, who then had not ended by himself."""


def run(folder: Path, command: Command, again: bool = False, fault: Fault | None = None) -> Outcome:
    """Run a command in `folder`."""
    begun, port = time.monotonic(), free_port()
    words = command.again or command.words if again else command.words
    output, ranks = folder / "output", len(words) if command.together != "jobs" else 1
    output.touch()  # a process may be killed before it writes anything
    before = output.stat().st_size

    def begin(number: int, fault: Fault | None) -> int:
        rank = number if ranks > 1 else 0
        return start(folder, words[number], (rank, ranks, port), f"events.{number}", fault)

    living = {begin(n, fault if fault and n in fault.processes else None): n for n in range(len(words))}
    codes, killed, late = [0] * len(words), False, None if fault is None else fault.seconds
    while living:
        elapsed = time.monotonic() - begun
        if fault is not None and late is not None and elapsed >= late:
            late = None
            hit = [child for child, number in living.items() if number in fault.processes]
            if fault.kind == "kill":
                end(hit, signal.SIGKILL)
            elif fault.kind == "twice":
                living |= {begin(number, None): number for number in [living[child] for child in hit]}
        if fault is not None and elapsed > command.seconds + LIMIT:
            end(living, signal.SIGKILL)
        for child in list(living):
            done, status = os.waitpid(child, os.WNOHANG)
            if not done:
                continue
            number, code = living.pop(child), os.waitstatus_to_exitcode(status)
            codes[number] = codes[number] or code
            if code == -signal.SIGKILL and fault is not None and fault.kind == "kill" and not killed:
                killed = True
                if command.together == "jobs" and len(words) > 1:
                    codes[number] = 0
                    living[begin(number, None)] = number
            if code and command.together == "torchrun":
                end(living, signal.SIGTERM)
        time.sleep(0.01)
    return Outcome(codes, time.monotonic() - begun, output.read_bytes()[before:].decode(), killed)


def end(children: Any, how: signal.Signals) -> None:
    for child in children:
        os.kill(child, how)


def start(folder: Path, words: Sequence[str], place: tuple[int, int, int], events: str, fault: Fault | None) -> int:
    """A child that runs a command line; its process id.

    Args:
        folder: in which it runs.
        words: the command line.
        place: its rank, the number of ranks, and the port of the first one.
        events: name of the file in which it counts.
        fault: that befalls it at a change to a file.
    """
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 70
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(folder)
        os.environ["LOLCATS_CACHE"] = str(folder / "cache")
        rank, ranks, port = place
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with output():
            count = watch_events(fault)
            code = main(list(words))
        if fault is None:
            Path(events).write_text(str(count()))
    finally:
        os._exit(code)


@contextmanager
def output() -> Iterator[None]:
    """Inside, all that is said goes to the file "output" through another process, which a full disk does not hinder."""
    with Path("output").open("a") as log, subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log) as said:
        assert said.stdin is not None
        for descriptor in (1, 2):
            os.dup2(said.stdin.fileno(), descriptor)
        said.stdin.close()
        # The old ones remember where in a file they were.
        sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
        try:
            yield
        except Exception:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor in (1, 2):
                os.close(descriptor)  # the other process ends with this one's last word


def watch_events(fault: Fault | None) -> Callable[[], int]:
    """Count this process's changes to files; at number `fault.event` it is killed, or can write to no file any more."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        writing = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (writing or event in WRITES):
            return
        seen += 1
        if fault is None or seen != fault.event:
            return
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    sys.addaudithook(hook)
    return lambda: seen


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
