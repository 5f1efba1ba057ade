"""Several processes, one run: what the main process decides is told to all, and one that fails ends all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from lolcats.config import FinetuneConfig, OptimConfig
from lolcats.errors import LolcatsError
from lolcats.training.process_meeting import meet, named_by_environment

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


def check_batch_size(name: str, config: OptimConfig, processes: int, sharded: bool = False) -> None:
    """Refuse a batch that leaves a process without a sequence; of sharded weights, one that is not shared evenly.

    Raises:
        LolcatsError: fewer sequences than processes; or sharded weights, which all processes compute with in step.
    """
    size = config.batch_size
    if size < processes:
        raise LolcatsError(
            f"{name}.batch_size is {size}, but {processes} processes share each batch: set it to {processes} or "
            "more, or start fewer processes"
        )
    if not sharded:
        return
    if size % processes:
        raise LolcatsError(
            f"{name}.batch_size is {size}, which {processes} processes cannot share evenly, as sharded weights need: "
            f"set it to a multiple of {processes}, or start another number of processes"
        )
    passing = config.passing if isinstance(config, FinetuneConfig) and config.passing.share else None
    if passing is not None and size // passing.chunks % processes:
        raise LolcatsError(
            f"{name}.batch_size {size} makes {size // passing.chunks} long texts of finetune.passing.chunks "
            f"{passing.chunks}, which {processes} processes cannot share evenly, as sharded weights need: set it to a "
            f"multiple of {processes * passing.chunks}"
        )


@contextmanager
def ending_together(start: Callable[[], Accelerator]) -> Iterator[Accelerator]:
    """Start an accelerator; inside, a process that fails or is killed soon ends the others too, with its message.

    Otherwise they would wait for it in their next exchange until that times out, after 10 minutes or more. Where the
    environment names the processes, as `torchrun` does, they are watched from before the accelerator starts, which is
    itself such an exchange.

    Raises:
        LolcatsError: another process did not start, or was killed and this one noticed it by a broken connection.
    """
    watch = meet(None) if named_by_environment() else None
    try:
        accelerator = start()
        if watch is None and accelerator.num_processes > 1:
            watch = meet(accelerator)
        yield accelerator
        if watch is not None:
            watch.done()
            accelerator.wait_for_everyone()
    except BaseException as error:
        if watch is not None and (reason := watch.tell(error, describe(error))) is not None:
            raise LolcatsError(reason) from error
        raise
    finally:
        if watch is not None:
            watch.stop()


def describe(error: BaseException) -> str:
    """An exception in words, for the other processes."""
    if isinstance(error, LolcatsError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
