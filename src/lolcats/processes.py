"""Several processes, one run: what the main process decides is told to all, and one that fails ends all."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from lolcats.errors import LolcatsError
from lolcats.process_watch import ProcessWatch, connect, own_place

T = TypeVar("T")


def from_main_process(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Do something in the main process while the others wait, and give what it returned to all of them.

    Files are looked at in this way: each process by itself might find another state, and take another way through the
    run than those that wait for it.

    Raises:
        LolcatsError: in the other processes, whatever `action` raised; in the main process its own exception.
    """
    if accelerator.num_processes == 1:
        return action()
    told: list[Any] = [None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            told[0] = action()
        except Exception as error:
            failure, told[1] = error, describe(error)
    broadcast_object_list(told)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise LolcatsError(told[1])
    return told[0]


def on_main_process(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Do something in the main process while the others wait; raises as `from_main_process` does."""

    def act() -> None:
        action()

    from_main_process(accelerator, act)


def check_same(accelerator: Accelerator, value: str, what: str) -> None:
    """Refuse processes that do not have the same `value`.

    Raises:
        LolcatsError: `what` differs, in every process.
    """
    if accelerator.num_processes == 1:
        return
    values = gather_object([value])
    others = [rank for rank, other in enumerate(values) if other != values[0]]
    if others:
        raise LolcatsError(
            f"expected {what} to be the same in all processes; process {others[0]} has others than process 0: "
            "give all of them the same files"
        )


def check_batch_size(name: str, batch_size: int, processes: int) -> None:
    """Refuse a batch that leaves a process without a sequence.

    Raises:
        LolcatsError: fewer sequences than processes.
    """
    if batch_size < processes:
        raise LolcatsError(
            f"{name}.batch_size is {batch_size}, but {processes} processes share each batch: set it to {processes} or "
            "more, or start fewer processes"
        )


@contextmanager
def ending_together(accelerator: Accelerator) -> Iterator[None]:
    """Inside, a process that fails or is killed ends the others too, with its message, within seconds.

    Otherwise they would wait for it in their next exchange until that times out, after 10 minutes or more.

    Raises:
        LolcatsError: another process was killed and this one noticed it by a broken connection.
    """
    if accelerator.num_processes == 1:
        yield
        return
    address = os.environ.get("MASTER_ADDR") or socket.gethostname()
    rank, count = accelerator.process_index, accelerator.num_processes
    store = connect(rank, count, address, lambda port: from_main_process(accelerator, lambda: port))
    watch = ProcessWatch(store, rank, gather_object([own_place()]))
    try:
        yield
        watch.done()
        accelerator.wait_for_everyone()
    except BaseException as error:
        if (reason := watch.tell(error, describe(error))) is not None:
            raise LolcatsError(reason) from error
        raise
    finally:
        watch.stop()


def describe(error: BaseException) -> str:
    """An exception in words, for the other processes."""
    if isinstance(error, LolcatsError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
