"""One block of stage 1, from its hidden states to its best weights and the next block's hidden states."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

import torch
from accelerate import Accelerator

from lolcats.errors import LolcatsError
from lolcats.files import hold, is_held, write_json
from lolcats.identity import weight_sample
from lolcats.modeling.attention import added_parameters
from lolcats.modeling.hf import is_added
from lolcats.models.block import Block
from lolcats.runs.blocks.plan import AS_IT_IS, METRICS
from lolcats.runs.blocks.work import Work, own_layers, restore_start
from lolcats.runs.state import use_compiled
from lolcats.training import Reporter, TrainResult, train
from lolcats.training.blocks.hidden import Recomputed, Sink, Source, Stored, Tokens
from lolcats.training.blocks.order import Order
from lolcats.training.blocks.stage import BlockStage, Passage
from lolcats.training.checkpoint import parameter_tensors, save_tensors

BRIEF = 1.0
"""Seconds: who waits for a block looks now and then whether its lock is held, and holds it while it does."""


def train_block(work: Work, number: int, accelerator: Accelerator, wait: Callable[[], bool] | None = None) -> None:
    """Do all that there is to do for one block; what is done already is not done again.

    Args:
        work: prepared.
        number: of the block.
        accelerator: of one process.
        wait: whether to wait for hidden states that nobody makes at the moment; None: never.

    Raises:
        LolcatsError: another process trains it, hidden states are missing and nobody makes them, or what `train`
            raises.
    """
    work.plan.check_number(number)
    places = work.places
    busy = f"another process trains block {number} ({places.block(number)}); wait for it or end it"
    with hold(places.lock(number), busy, BRIEF):
        if places.done(number).exists():
            work.say(f"block {number}: done already")
            _drop(work, number)
            return
        block = work.load_linearized(work.plan.part(number))
        restore_start(work, block)
        with ExitStack() as stack:
            passage = _passage(work, block, number, stack, partial(_check, work, number, wait))
            _train(work, passage, number, accelerator)
            passage.complete(work.precision)
        samples = {
            name: weight_sample(name, p).hex()
            for name, p in block.model.named_parameters()
            if not (is_added(name) or p.is_meta)
        }
        write_json(places.done(number), {"layers": len(own_layers(block)), "samples": samples})
        _drop(work, number)


def _passage(work: Work, block: Block, number: int, stack: ExitStack, check: Callable[[], None]) -> Passage:
    """The block between the hidden states in front of it and those behind it."""
    settings = work.config.transfer.blocks
    order = Order(work.config.transfer, work.data, work.config.seed, work.device)
    stored = settings.hidden == "store"
    source: Source = Tokens()
    if number and stored:
        source = Stored(stack.enter_context(work.store(number)), order, check)
    elif number:
        before = [partial(work.load, work.plan.part(other)) for other in range(number)]
        source = Recomputed(order, before, work.precision)
    last = number == work.plan.count - 1
    store = stack.enter_context(work.store(number + 1)) if stored and not last else None
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    sink = Sink(store, dtype, lambda: not settings.keep and work.places.done(number + 1).exists())
    return Passage(block, order, source, sink)


def _drop(work: Work, number: int) -> None:
    """Delete the hidden states that a finished block was trained from, unless they are to be kept."""
    if number and not work.config.transfer.blocks.keep:
        with suppress(FileNotFoundError):
            shutil.rmtree(work.places.boundary(number))


def _check(work: Work, number: int, wait: Callable[[], bool] | None) -> None:
    """Raise LolcatsError where the hidden states of a block are missing and nobody makes them."""
    places, before = work.places, number - 1
    if places.done(before).exists():
        raise LolcatsError(
            f"hidden states of block {number} are missing in {places.boundary(number)}, though block {before} is "
            f"finished: delete {places.block(before)} and start {work.command(before)}, or set "
            "transfer.blocks.hidden=recompute"
        )
    if is_held(places.lock(before)) or (wait is not None and wait()):
        return
    raise LolcatsError(
        f"block {number} waits for the hidden states of block {before}, which nobody trains: start "
        f"{work.command(before)}"
    )


def _train(work: Work, passage: Passage, number: int, accelerator: Accelerator) -> None:
    """Stage 1 of the block, or its parameters as they are where it has nothing to learn."""
    places, config = work.places, work.config.transfer
    layers = own_layers(passage.block)
    if not any(layer.mixer.learns for layer in layers):
        work.say(f"block {number}: nothing to learn, its hidden states are handed on")
        if layers:
            parameters = {n: p for n, p in added_parameters(passage.block.model).items() if not p.is_meta}
            save_tensors(places.block(number) / AS_IT_IS, parameter_tensors(parameters), {"step": 0})
        return
    use_compiled(passage.block.model, work.device, False if config.varies_window else config.compile)
    reporter = Reporter(places.block(number) / METRICS, work.console if work.alone else None)
    # A recording of a step could neither wait for hidden states nor hand them on.
    result = train(
        BlockStage(passage, config), config.model_copy(update={"cuda_graph": False}), work.data, places.block(number),
        reporter, accelerator=accelerator, seed=work.config.seed, autocast=work.autocast,
    )  # fmt: skip
    _say_result(work, number, result)


def _say_result(work: Work, number: int, result: TrainResult) -> None:
    part = work.plan.part(number)
    work.say(
        f"block {number} (layers {part.first} to {part.last - 1}): {result.tokens:,} tokens in {result.seconds:,.0f} s "
        f"({result.tokens_per_second:,.0f} tokens/s), best validation loss {result.best_loss:.4g} at step "
        f"{result.best_step} of {result.steps}"
    )
