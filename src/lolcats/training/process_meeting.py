"""How the processes of one run find each other, and the store that `ProcessWatch` looks at.

A process that is killed before the others have met it would leave them waiting for half an hour inside the library that
connects them. So they meet here first, at the address that the environment names, with a limit of their own.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import count

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed import TCPStore, is_initialized  # pyright: ignore[reportPrivateImportUsage]

from lolcats.errors import LolcatsError, first_line
from lolcats.training.process_watch import KILLED, ProcessWatch, lives, own_place

MEETING_SECONDS = 60.0
"""How long processes wait for one that has not started, where nothing else watches them; see `_limit`."""
LIMIT_VARIABLE = "LOLCATS_MEETING_SECONDS"
CONNECT_SECONDS = 60
"""How long the store may take to be there, once all have met."""
READ_SECONDS = 10
"""How long process 0 waits for those that are there to read its word."""
LOOK_SECONDS = 0.05
_meetings = count()
"""Meetings of this process; all processes have the same ones in the same order."""


def named_by_environment() -> bool:
    """Whether the environment names several processes that are not connected yet, as `torchrun` does."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(os.environ.get(name) for name in names) and int(os.environ["WORLD_SIZE"]) > 1 and not is_initialized()


def meet(accelerator: Accelerator | None) -> ProcessWatch:
    """Meet the other processes, through an accelerator that connects them or else as the environment says.

    Raises:
        LolcatsError: a process is not there in time, or has ended meanwhile.
    """
    if accelerator is None:
        rank, processes, address = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["MASTER_ADDR"]
    else:
        rank, processes = accelerator.process_index, accelerator.num_processes
        address = os.environ.get("MASTER_ADDR") or socket.gethostname()
    timeout = timedelta(seconds=CONNECT_SECONDS)
    told: list[tuple[int, str]] = []
    try:
        store = TCPStore(address, 0, processes, True, timeout, wait_for_workers=False) if rank == 0 else None
        own = (0 if store is None else store.port, own_place())
        meeting = _exchange(own, rank, processes, told) if accelerator is None else None
        if accelerator is not None:
            told = gather_object([own])
        if store is None:
            store = TCPStore(address, told[0][0], processes, False, timeout, wait_for_workers=False)
        return ProcessWatch(store, rank, [place for _, place in told], meeting)
    except RuntimeError as error:  # torch's connection errors are of this kind
        _check_alive(told)
        raise LolcatsError(
            f"process {rank} of {processes} cannot reach process 0, which may have ended: {first_line(error)}"
        ) from error


def _exchange(own: tuple[int, str], rank: int, processes: int, told: list[tuple[int, str]]) -> TCPStore:
    """Append to `told` what every process says, before a process group connects them.

    Returns:
        The store through which it was said, the one that the process group will use: at the port of the environment,
        in the main process (or in `torchrun`, which keeps it across restarts, hence their number in the keys).
    """
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    limit = _limit(hosted)
    prefix = f"lolcats/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_meetings)}/"
    address, port, main = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank == 0 and not hosted
    timeout, deadline = timedelta(seconds=limit), time.monotonic() + limit
    store = TCPStore(address, port, processes, main, timeout, wait_for_workers=False, multi_tenant=True)
    store.set(f"{prefix}{rank}", json.dumps(own))
    while len(told) < processes:
        if store.check([f"{prefix}{len(told)}"]):
            told.append(tuple(json.loads(store.get(f"{prefix}{len(told)}"))))
            continue
        _check_alive(told)
        if time.monotonic() > deadline:
            raise LolcatsError(
                f"process {len(told)} of {processes} did not start within {limit:g} seconds; look at its output (more "
                f"time for slow machines: the environment variable {LIMIT_VARIABLE})"
            )
        time.sleep(LOOK_SECONDS)
    _await_readers(store, f"{prefix}read", rank, told)
    return store


def _await_readers(store: TCPStore, key: str, rank: int, told: Sequence[tuple[int, str]]) -> None:
    """Go on from process 0 only when all have read who is there: what it ends with then, the others can name."""
    readers, deadline = store.add(key, 1), time.monotonic() + READ_SECONDS
    while rank == 0 and readers < len(told) and time.monotonic() < deadline:
        _check_alive(told)
        time.sleep(LOOK_SECONDS)
        readers = store.add(key, 0)


def _check_alive(told: Sequence[tuple[int, str]]) -> None:
    """Refuse to go on where a process that was there has ended."""
    for rank, (_, place) in enumerate(told):
        if not lives(place):
            raise LolcatsError(KILLED.format(rank))


def _limit(hosted: bool) -> float:
    """Seconds to wait. `torchrun` ends all processes when one fails, and its nodes may take long."""
    return float(os.environ.get(LIMIT_VARIABLE) or (1800.0 if hosted else MEETING_SECONDS))
