"""The jobs of a block-wise stage 1, as the command line and `lolcats.linearize` start them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from rich.console import Console

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.files import hold
from lolcats.models.device import check_impl, choose_device
from lolcats.runs.blocks.job import train_block
from lolcats.runs.blocks.plan import Places, check_plan
from lolcats.runs.blocks.prepare import prepare
from lolcats.runs.blocks.stitch import stitch
from lolcats.runs.blocks.work import Work, open_work, prepared, read_prepared
from lolcats.runs.folder import RunFolder
from lolcats.runs.results import Results
from lolcats.runs.state import open_run

Job = Literal["prepare", "stitch"] | int | None
"""What to do: one block by its number, or all of them (None)."""
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
PATIENCE = 600.0
"""Seconds that another process may take to put the blocks together."""
LOOK = 0.5
"""Seconds between two looks whether another process has prepared the run."""


class Ranks(NamedTuple):
    """One process of several that `torchrun` started."""

    rank: int
    size: int
    local: int
    """Its number on this machine."""


def train_blocks(
    config: RunConfig, folder: RunFolder, device: torch.device, results: Results, accelerator: Accelerator,
    console: Console | None, *, only_prepare: bool,
) -> None:  # fmt: skip
    """Stage 1 of a run whose settings ask for blocks, one after the other, unless it is finished.

    Args:
        config: of the run, whose folder is held.
        folder: of the run.
        device: where to train.
        results: of the run; the split of budgets is put there.
        accelerator: of one process.
        console: where progress is shown.
        only_prepare: only find out what is needed before the first block.

    Raises:
        LolcatsError: several processes; or what the jobs raise.
    """
    if folder.stage_state("transfer") == "finished":
        return
    if accelerator.num_processes > 1:
        raise LolcatsError("transfer.blocks.size: lolcats linearize trains blocks in one process, one after the other; "
                           "for blocks side by side start torchrun ... -m lolcats block first")  # fmt: skip
    work = open_work(config, folder, device, getattr(torch, results.dtype or ""), console)
    work = _prepare(work, results, at_once=1)
    if only_prepare:
        return
    for number in range(work.plan.count):
        train_block(work, number, accelerator)
    stitch(work)


def run_blocks(config: RunConfig, job: Job = None, *, wait: float = 0.0, overwrite: bool = False,
               console: Console | None = None) -> RunFolder:  # fmt: skip
    """Do one job of a block-wise stage 1, or this process's share of all blocks where `torchrun` started several.

    Args:
        config: all settings.
        job: what to do.
        wait: seconds to wait for hidden states that nobody makes yet.
        overwrite: of the job "prepare": delete the run first.
        console: where progress is shown; None is silent.

    Returns:
        The run's folder.

    Raises:
        LolcatsError: anything the user can mend; the message says how.
    """
    ranks = _take_ranks() if job is None else Ranks(0, 1, 0)
    check_plan(config, ranks.size)
    device = _device(config, ranks)
    folder = RunFolder.of(config)
    if job == "prepare" or (job is None and ranks.rank == 0):
        at_once = None if job == "prepare" else ranks.size
        work = _opened(config, folder, device, console, at_once, overwrite)
    else:
        if job is None:
            _await_prepared(Places(config, folder))
        work = _of_folder(config, folder, device, console)
    if job == "stitch":
        stitch_blocks(work)
    elif job is None:
        _train_share(work, ranks)
    elif job != "prepare":
        train_block(work, job, _accelerator(work), _waiting(wait))
    return folder


def _train_share(work: Work, ranks: Ranks) -> None:
    """Train each block that is this process's, and wait for the others; the first one then puts all together."""
    work, accelerator = replace(work, alone=ranks.size == 1), _accelerator(work)
    # torchrun ends all processes when one fails, so whoever makes what is missing is there.
    for number in range(ranks.rank, work.plan.count, ranks.size):
        train_block(work, number, accelerator, lambda: ranks.size > 1)
    # torchrun can start all again where one dies, on another machine say, as long as nobody has ended.
    while not all(work.places.done(number).exists() for number in range(work.plan.count)):
        time.sleep(LOOK)
    stitch_blocks(work)


def stitch_blocks(work: Work) -> None:
    """Put all blocks together, unless that is done already.

    Raises:
        LolcatsError: see `stitch`; or another process works on the run, longer than that takes.
    """
    run = work.places.run
    with hold(run.lock_file, f"another process works on the run {run.path}; wait for it or end it", PATIENCE):
        if run.stage_state("transfer") != "finished":
            stitch(work)
    work.say(f"stage 1 is finished; lolcats linearize {run.config_file} --resume goes on with it")


def _accelerator(work: Work) -> Accelerator:
    return Accelerator(cpu=work.device.type == "cpu")


def _device(config: RunConfig, ranks: Ranks) -> torch.device:
    """The device of this process."""
    device = choose_device(config.device)
    if device.type == "cuda":
        if config.device == "auto" and ranks.size > 1:
            device = torch.device("cuda", ranks.local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    check_impl(config.linearization.impl, device)
    return device


def _waiting(seconds: float) -> Callable[[], bool]:
    """Whether less than some seconds have passed since now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() < end


def _opened(
    config: RunConfig, folder: RunFolder, device: torch.device, console: Console | None, at_once: int | None,
    overwrite: bool,
) -> Work:  # fmt: skip
    """Open the run's folder as `lolcats linearize` does, and prepare it for blocks, all of them at once for None."""
    with ExitStack() as held:
        resume = not overwrite and folder.config_file.exists()
        results = open_run(folder, config, device, held, resume, overwrite)
        if results is None:
            raise LolcatsError(f"the run {folder.path} is finished already; choose another name=...")
        work = open_work(config, folder, device, getattr(torch, results.dtype or ""), console)
        return _prepare(work, results, at_once or work.plan.count)


def _prepare(work: Work, results: Results, at_once: int) -> Work:
    """Prepare the run, and put into its results what `lolcats linearize` looks for there."""
    searches = work.config.linearization.searches
    work = prepare(work, at_once)
    if searches:
        results.split = work.config.linearization.model_dump(mode="json")["split"]
    work.places.run.write_results(results)
    return work


def _of_folder(config: RunConfig, folder: RunFolder, device: torch.device, console: Console | None) -> Work:
    """The work of a run that is prepared."""
    dtype = getattr(torch, str(read_prepared(Places(config, folder)).get("dtype")))
    return prepared(open_work(config, folder, device, dtype, console))


def _await_prepared(places: Places) -> None:
    """Wait until the first process has prepared the run: `torchrun` ends this one if it fails."""
    while not places.prepared.exists():
        time.sleep(LOOK)


def _take_ranks() -> Ranks:
    """What `torchrun` says of this process; forgotten then, since blocks have nothing to tell each other."""
    ranks = Ranks(*(int(os.environ.get(name, default)) for name, default in
                    (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))))  # fmt: skip
    for name in OF_TORCHRUN:
        os.environ.pop(name, None)
    return ranks
