"""The jobs of a block-wise stage 1, as the command line and `lolcats.linearize` start them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from rich.console import Console

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.models.device import check_impl, choose_device
from lolcats.runs.blocks.job import train_block
from lolcats.runs.blocks.plan import Places
from lolcats.runs.blocks.prepare import prepare
from lolcats.runs.blocks.stitch import stitch
from lolcats.runs.blocks.work import Work, open_work, prepared
from lolcats.runs.folder import RunFolder
from lolcats.runs.results import Results
from lolcats.runs.state import open_run

Job = Literal["prepare", "stitch"] | int | None
"""What to do: one block by its number, or all of them (None)."""
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
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


def run_blocks(config: RunConfig, target: str, job: Job = None, *, wait: float = 0.0, overwrite: bool = False,
               console: Console | None = None) -> RunFolder:  # fmt: skip
    """Do one job of a block-wise stage 1, or this process's share of all blocks where `torchrun` started several.

    Args:
        config: all settings.
        target: how the command line names them, for messages.
        job: what to do.
        wait: seconds to wait for hidden states that nobody makes yet.
        overwrite: of the job "prepare": delete the run first.
        console: where progress is shown; None is silent.

    Returns:
        The run's folder.

    Raises:
        LolcatsError: anything the user can mend; the message says how.
    """
    ranks = _take_ranks() if job is None else None
    device = choose_device(config.device)
    if ranks is not None and config.device == "auto" and device.type == "cuda":
        device = torch.device("cuda", ranks.local % torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    check_impl(config.linearization.impl, device)
    folder = RunFolder.of(config)
    if job == "prepare" or (job is None and (ranks is None or ranks.rank == 0)):
        work = _opened(config, folder, device, console, target, ranks, overwrite, at_once=job is None)
    else:
        if job is None:
            _await_prepared(config, folder)
        work = _of_folder(config, folder, device, console, target)
    if job == "stitch":
        with folder.held():
            stitch(work)
        work.say(f"stage 1 is put together; lolcats linearize {target} --resume goes on with it")
    elif job != "prepare":
        _train(work, job, ranks, wait)
    return folder


def _train(work: Work, job: int | None, ranks: Ranks | None, wait: float) -> None:
    """Train one block, or each that is this process's."""
    accelerator = Accelerator(cpu=work.device.type == "cpu")
    if job is not None:
        train_block(work, job, accelerator, _waiting(wait))
        return
    rank, count = (0, 1) if ranks is None else ranks[:2]
    work.plan.check_ranks(count)
    # torchrun ends all processes when one fails, so whoever makes what is missing is there.
    for number in range(rank, work.plan.count, count):
        train_block(work, number, accelerator, lambda: count > 1)
    if count == 1:
        with work.places.run.held():
            stitch(work)


def _waiting(seconds: float) -> Callable[[], bool]:
    """Whether less than some seconds have passed since now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() < end


def _opened(
    config: RunConfig, folder: RunFolder, device: torch.device, console: Console | None, target: str,
    ranks: Ranks | None, overwrite: bool, at_once: bool,
) -> Work:  # fmt: skip
    """Open the run's folder as `lolcats linearize` does, and prepare it."""
    with ExitStack() as held:
        resume = not overwrite and folder.config_file.exists()
        results = open_run(folder, config, device, held, resume, overwrite)
        if results is None:
            raise LolcatsError(f"the run {folder.path} is finished already; choose another name=...")
        work = open_work(config, folder, device, getattr(torch, results.dtype or ""), console, target)
        count = 1 if ranks is None else ranks.size
        work.plan.check_ranks(count)
        return _prepare(work, results, count if at_once else work.plan.count)


def _prepare(work: Work, results: Results, at_once: int) -> Work:
    """Prepare the run, and put into its results what `lolcats linearize` looks for there."""
    searches = work.config.linearization.searches
    work = prepare(work, at_once)
    if searches:
        results.split = work.config.linearization.model_dump(mode="json")["split"]
    work.places.run.write_results(results)
    return work


def _of_folder(
    config: RunConfig, folder: RunFolder, device: torch.device, console: Console | None, target: str
) -> Work:
    """The work of a run that is prepared."""
    dtype = folder.results().dtype
    if dtype is None:
        raise LolcatsError(f"{folder.path} is not prepared for training by blocks yet; prepare it: lolcats block "
                           f"{target} --prepare")  # fmt: skip
    return prepared(open_work(config, folder, device, getattr(torch, dtype), console, target))


def _await_prepared(config: RunConfig, folder: RunFolder) -> None:
    """Wait until the first process has prepared the run: `torchrun` ends this one if it fails."""
    while not Places(config, folder).prepared.exists():
        time.sleep(LOOK)


def _take_ranks() -> Ranks | None:
    """What `torchrun` says of this process; forgotten then, since blocks have nothing to tell each other."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0")))
    for name in OF_TORCHRUN:
        os.environ.pop(name, None)
    return ranks
