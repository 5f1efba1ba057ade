"""What is found out from text before blocks are trained, one block of the teacher in memory at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lolcats.files import check_room, write_json
from lolcats.modeling import check_model, convert
from lolcats.modeling.attention import linearized_layers
from lolcats.modeling.budget import SplitSearch, check_gradients, label_gradient, watched
from lolcats.modeling.head import OutputHead
from lolcats.modeling.start import MAX_ROWS, MAX_TOKENS, start_from_text
from lolcats.models.block import Block, Part
from lolcats.models.block_check import check_blocks
from lolcats.printable import show_bytes
from lolcats.runs.blocks.plan import hidden_bytes
from lolcats.runs.blocks.work import Work, fixed_settings, own_layers, own_tensors, prepared, with_found_split
from lolcats.runs.state import start_batch
from lolcats.training.checkpoint import save_tensors


def prepare(work: Work, at_once: int) -> Work:
    """Find out what the layers begin with, and write it into the run's folder; what is there already stays.

    Args:
        work: from `open_work`.
        at_once: blocks that will be trained at the same time.

    Returns:
        The work with the split of budgets.

    Raises:
        LolcatsError: the family cannot be run by blocks, the hidden states do not fit on the disk, or what was prepared
            belongs to something else.
    """
    check_disk_need(work, at_once)
    if work.places.prepared.exists():
        return prepared(work)
    _check_family(work)
    asked, split = fixed_settings(work.config), None
    ids = start_batch(work.config, work.data)
    if work.config.linearization.searches:
        split = _find_split(work, ids)
        work = replace(work, config=with_found_split(work.config, split))
    if work.config.linearization.starts_from_text:
        save_tensors(work.places.start, _starts(work, ids), {"step": 0})
    content = {"config": asked, "split": split, "dtype": str(work.dtype).removeprefix("torch.")}
    content |= {key: work.identity[key] for key in ("model", "data")}
    work.places.root.mkdir(parents=True, exist_ok=True)
    write_json(work.places.prepared, content)
    return work


def _check_family(work: Work) -> None:
    """The self-check of the family, on a small model of it: the whole one is never there."""
    small, layers = check_blocks(work.model_config), work.config.linearization.without_text()
    if getattr(layers, "split", None) is not None:  # the small model has fewer heads
        layers = layers.model_copy(update={"split": None, "budget": "uniform"})
    check_model(convert(small, layers, seed=0)).require()


def check_disk_need(work: Work, at_once: int) -> None:
    """Say how much disk the hidden states take, and refuse what does not fit.

    Raises:
        LolcatsError: less is free.
    """
    validation = len(work.data.validation)
    need = hidden_bytes(work.config, work.plan, work.model_config, work.dtype, validation, at_once)
    hidden = work.places.hidden
    there = sum(file.stat().st_size for file in hidden.rglob("*.safetensors")) if hidden.is_dir() else 0
    one = Part(0, work.plan.size)
    work.say(f"stage 1 by {work.plan.count} blocks of {one.last} layers, up to {at_once} at once; hidden states take "
             f"up to {show_bytes(need)} of disk in {hidden}")  # fmt: skip
    check_room(hidden, max(0, need - there), "name another folder (transfer.blocks.folder), or let hidden states be "
               "computed anew (transfer.blocks.hidden=recompute)")  # fmt: skip


def _find_split(work: Work, ids: Tensor) -> list[Any]:
    """As `find_split`: the streams of the first rows forward, their gradients backward, block by block."""
    count, layers = work.plan.count, work.config.linearization
    streams: list[list[Tensor]] = []  # in front of each block but the first, and behind the last
    rows = ids[:MAX_ROWS, :MAX_TOKENS]
    for number in range(count):
        block = work.load(work.plan.part(number))
        before: list[Any] = streams[-1] if streams else [None] * len(rows)
        streams.append([_run(work, block, row, hidden) for row, hidden in zip(rows, before, strict=True)])
    gradients = _loss_gradients(work, rows, streams[-1])
    search: SplitSearch | None = None
    for number in reversed(range(count)):
        block = work.load_linearized(work.plan.part(number))
        search = search or SplitSearch([m.mixer.sizes for m in linearized_layers(block.model)], layers, ids)
        for row in range(len(rows)):
            hidden = streams[number - 1][row].to(work.device) if number else None
            gradients[row] = _add_costs(block, search, row, hidden, gradients[row])
    assert search is not None
    return search.found(work.dtype)


@torch.no_grad()
def _run(work: Work, block: Block, row: Tensor, hidden: Tensor | None) -> Tensor:
    """The stream [1, N, d_model] of one text behind a block, in this machine's memory."""
    return block(row[None].to(work.device), None, None if hidden is None else hidden.to(work.device)).cpu()


def _loss_gradients(work: Work, rows: Tensor, streams: list[Tensor]) -> list[Tensor]:
    """The gradient of the teacher's loss for the stream behind the last layer, of each row."""
    block = work.load(Part(work.plan.layers, work.plan.layers, head=True))
    head, found = OutputHead(block.model), []
    for number, (row, stream) in enumerate(zip(rows, streams, strict=True)):
        with watched(block.model, []):
            given = stream.to(work.device).requires_grad_()
            with block.given(given):
                hidden = head.hidden(input_ids=row[None].to(work.device), use_cache=False)
            found.append(torch.autograd.grad(hidden, given, label_gradient(head, hidden.detach(), number))[0].cpu())
    return found


def _add_costs(block: Block, search: SplitSearch, row: int, hidden: Tensor | None, gradient: Tensor) -> Tensor:
    """Add what a row says of the layers of a block; the gradient for the stream in front of it.

    The first block has none to give on: its own is returned.
    """
    layers = own_layers(block)
    every = linearized_layers(block.model)
    device = next(p for p in block.model.parameters() if not p.is_meta).device
    given = None if hidden is None else hidden.requires_grad_()
    with watched(block.model, layers) as (calls, outputs):
        stream = block(search.rows[row][None].to(device), None, given)
        wanted = [*outputs, *([] if given is None else [given])]
        found = list(torch.autograd.grad(stream, wanted, gradient.to(device))) if wanted else []
    check_gradients(layers, found[: len(layers)])
    for layer, call, own in zip(layers, calls, found[: len(layers)], strict=True):
        search.add(row, every.index(layer), call, own)
    return gradient if given is None else found[-1].cpu()


def _starts(work: Work, ids: Tensor) -> dict[str, Tensor]:
    """What layers that start from text start with, by the names in the model."""
    found: dict[str, Tensor] = {}
    stream: Tensor | None = None
    for number in range(work.plan.count):
        block = work.load_linearized(work.plan.part(number))
        before, behind = stream, list[Tensor]()

        def run(rows: Tensor, block: Block = block, before: Tensor | None = before) -> None:
            given = None if before is None else before.to(work.device)
            behind.append(block(rows.to(work.device), None, given).cpu())  # noqa: B023  # called in this turn

        start_from_text(block.model, own_layers(block), ids, run)
        stream = behind[0]
        found |= {name: tensor.detach().cpu() for name, tensor in own_tensors(block).items()}
    return found
