"""What a stage takes in one layout: memory of a GPU, seconds, arithmetic, disk.

What takes time besides training is left out: loading, reading text, measuring.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from lolcats.config import OptimConfig, RunConfig
from lolcats.planning.disk import hidden_bytes, stored_states
from lolcats.planning.flops import finetune_step, optimizer_step, teacher_step, transfer_step
from lolcats.planning.hardware import GIB, GPUS_A_HOST, HOST_MEMORY, Machine
from lolcats.planning.memory import (
    Memory,
    finetune_memory,
    packed_width,
    trained_numbers,
    transfer_memory,
)
from lolcats.planning.shapes import ModelShape
from lolcats.planning.work import Work, seconds_of

DISK = 0.7e9
"""Bytes a second with which a process writes hidden states, and reads others: measured on the disk of one machine."""
NETWORK = 50e9
"""Bytes a second of a GPU to other hosts: a link of 400 Gbit/s for each, as servers of this kind have."""
UNPACK = 2.5
"""Bytes that move for each number of a 4-bit weight when it is written out for a product."""


@dataclass(frozen=True)
class Layout:
    """How a stage is spread over GPUs and their memory."""

    ranks: int = 1
    rows: int = 1
    """Sequences at once on a GPU."""
    quantization: str = "none"
    block: int | None = None
    """Layers of a block that is trained by itself; None: all layers together."""
    hidden: Literal["", "store", "recompute"] = ""
    """What blocks do for the hidden states in front of them."""
    shard: bool = False
    offload: bool = False
    checkpointing: bool = False


@dataclass(frozen=True)
class StagePlan:
    """A stage in one layout."""

    layout: Layout
    memory: Memory
    tokens: int
    flops: float
    seconds: float
    disk: int = 0
    """Bytes of hidden states."""
    gpus: int = 1
    """That are busy at the same time."""

    @property
    def gpu_seconds(self) -> float:
        """Of all GPUs together."""
        return self.seconds * self.gpus

    def lacking(self, machine: Machine) -> float:
        """GiB that a GPU has too little, or its host; at most 0 where it fits."""
        host = self.memory.host * min(self.gpus, GPUS_A_HOST) / GIB - HOST_MEMORY
        return max(self.memory.needed() - machine.gpu.memory, host)


def transfer_plan(model: ModelShape, config: RunConfig, machine: Machine, layout: Layout) -> StagePlan:
    """Stage 1."""
    stage = config.transfer
    steps = stage.steps(config.data.sequence_length)
    tokens = steps * stage.batch_size * config.data.sequence_length
    if layout.block is not None:
        return _blocks_plan(model, config, machine, layout, steps, tokens)
    micro = _micro_steps(stage, layout)
    once = [*transfer_step(model, config, layout.rows), *_unpacking(model, layout, passes=1)]
    last = optimizer_step(model.added, len(model.layers))
    graph = stage.records_steps
    seconds = steps * (micro * seconds_of(once, machine.gpu, graph) + seconds_of(last, machine.gpu, graph))
    memory = transfer_memory(model, config, layout.rows, layout.quantization)
    return StagePlan(layout, memory, tokens, _flops(once, layout.rows, config) * tokens, seconds, gpus=layout.ranks)


def _blocks_plan(
    model: ModelShape, config: RunConfig, machine: Machine, layout: Layout, steps: int, tokens: int
) -> StagePlan:
    """Blocks one after the other on one GPU, or side by side, each as soon as the one before has written a step."""
    assert layout.block is not None
    count = len(model.layers) // layout.block
    blocks = [slice(number * layout.block, (number + 1) * layout.block) for number in range(count)]
    micro = -(-config.transfer.batch_size // layout.rows)
    per_step = config.data.sequence_length * config.transfer.batch_size
    moved = 0.0 if layout.hidden == "recompute" else hidden_bytes(config, per_step, model.hidden) / DISK
    seconds, flops, memory = [], 0.0, Memory(0, 0, 0)
    known: dict[Any, tuple[float, float, Memory]] = {}
    for block in blocks:
        first = block.start if layout.hidden == "recompute" else block.start == 0
        key = first, tuple(map(id, model.layers[block]))  # most blocks are alike
        if key not in known:
            once = _block_step(model, config, layout, block)
            last = optimizer_step(sum(layer.added for layer in model.layers[block]), layout.block)
            # Blocks are not recorded: a recording could neither wait for hidden states nor hand them on.
            step = micro * seconds_of(once, machine.gpu, False) + seconds_of(last, machine.gpu, False)
            a_token, held = _flops(once, layout.rows, config), _block_memory(model, config, layout, block)
            known[key] = steps * max(step, moved), a_token * tokens, held
        seconds.append(known[key][0])
        flops, memory = flops + known[key][1], max(memory, known[key][2], key=Memory.needed)
    waves = [seconds[begin : begin + layout.ranks] for begin in range(0, count, layout.ranks)]
    disk = stored_states(config, model.hidden, count, layout.ranks) if layout.hidden == "store" else 0
    return StagePlan(layout, memory, tokens, flops, sum(map(max, waves)), disk, layout.ranks)


def _block_step(model: ModelShape, config: RunConfig, layout: Layout, block: slice) -> list[Work]:
    """A block's own layers, and those before it where their hidden states are not kept."""
    pieces = [*transfer_step(model, config, layout.rows, block), *_unpacking(model, layout, 1, block)]
    if layout.hidden == "recompute" and block.start:
        before = slice(0, block.start)
        pieces += teacher_step(model, layout.rows, config.data.sequence_length, before)
        pieces += _unpacking(model, layout, 1, before)
    return pieces


def _block_memory(model: ModelShape, config: RunConfig, layout: Layout, block: slice) -> Memory:
    """With the hidden states of a step in front of it and behind it; the first block has the embeddings instead."""
    memory = transfer_memory(model, config, layout.rows, layout.quantization, block)
    states = 2 * hidden_bytes(config, layout.rows * config.data.sequence_length, model.hidden)
    embeddings = 0 if block.start else 2 * model.vocabulary * model.hidden
    return replace(memory, weights=memory.weights + embeddings, activations=memory.activations + states)


def finetune_plan(model: ModelShape, config: RunConfig, machine: Machine, layout: Layout) -> StagePlan:
    """Stage 2."""
    stage, gpu = config.finetune, machine.gpu
    steps = stage.steps(config.data.sequence_length)
    tokens = steps * stage.batch_size * config.data.sequence_length
    passes = 2 + layout.checkpointing + stage.follows_teacher
    once = finetune_step(model, config, layout.rows, layout.checkpointing)
    once += _unpacking(model, layout, passes)
    trained = trained_numbers(model, config)
    spread = layout.shard or layout.offload
    recorded = stage.model_copy(update={"gradient_checkpointing": layout.checkpointing}).records_steps
    graph = recorded and not spread
    compute = max(seconds_of(once, gpu, graph), passes * _weights_move(model, config, machine, layout))
    last = seconds_of(optimizer_step(trained // (layout.ranks if spread else 1), len(model.layers) * 7), gpu, graph)
    last += 0.0 if layout.ranks == 1 else 2 * 4 * trained / _between(machine, layout)
    memory = finetune_memory(
        model, config, layout.rows, layout.quantization, ranks=layout.ranks, shard=layout.shard,
        checkpointing=layout.checkpointing, offload=layout.offload,
    )  # fmt: skip
    seconds = steps * (_micro_steps(stage, layout) * compute + last)
    return StagePlan(layout, memory, tokens, _flops(once, layout.rows, config) * tokens, seconds, gpus=layout.ranks)


def _micro_steps(stage: OptimConfig, layout: Layout) -> int:
    """How often a rank runs the model in a step; the rank with the most sequences is waited for."""
    own = math.ceil(stage.batch_size / layout.ranks)
    return math.ceil(own / layout.rows)


def _flops(pieces: Iterable[Work], rows: int, config: RunConfig) -> float:
    """Of a token."""
    return sum(piece.flops for piece in pieces) / (rows * config.data.sequence_length)


def _unpacking(model: ModelShape, layout: Layout, passes: int, layers: slice = slice(None)) -> list[Work]:
    """Packed weights are written out for each product."""
    if layout.quantization == "none":
        return []
    matrices = [matrix for layer in model.layers[layers] for matrix in layer.matrices]
    moved = UNPACK * sum(matrix.numbers for matrix in matrices)
    return [Work("bytes", bytes=moved, kernels=2.0 * len(matrices)).times(passes)]


def _weights_move(model: ModelShape, config: RunConfig, machine: Machine, layout: Layout) -> float:
    """Seconds in which the layers' weights come to a GPU once, from other GPUs and from the host."""
    width = 4.0 if config.finetune.method == "full" else packed_width(layout.quantization)
    weights = width * sum(layer.numbers for layer in model.layers)
    others = weights * (layout.ranks - 1) / layout.ranks / _between(machine, layout) if layout.shard else 0.0
    host = weights / layout.ranks / machine.gpu.host if layout.offload else 0.0
    return others + host


def _between(machine: Machine, layout: Layout) -> float:
    """Bytes a second from one GPU of a stage to another."""
    return machine.gpu.link if layout.ranks <= GPUS_A_HOST else min(machine.gpu.link, NETWORK)
