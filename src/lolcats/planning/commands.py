"""The commands that run a plan."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from lolcats.config import RunConfig
from lolcats.planning.hardware import GPUS_A_HOST
from lolcats.planning.layout import Choice
from lolcats.planning.stages import Layout

SPREAD = ("gradient_checkpointing", "sharding.enabled", "sharding.cpu_offload")
"""Settings of stage 2 that say where its weights and activations lie."""


def settings_of(config: RunConfig, chosen: Mapping[str, Choice]) -> list[str]:
    """KEY=VALUE of what a plan changes in the settings."""
    found = []
    for stage, choice in chosen.items():
        layout, own = choice.plan.layout, getattr(config, stage)
        if layout.quantization != config.quantization:
            found.append(f"quantization={layout.quantization}")
        if layout.rows != (own.micro_batch_size or own.batch_size):
            found.append(f"{stage}.micro_batch_size={layout.rows}")
        if layout.block is not None:
            blocks = {"size": layout.block, "hidden": layout.hidden}
            found += [f"transfer.blocks.{k}={v}" for k, v in blocks.items() if getattr(own.blocks, k) != v]
        if stage == "finetune":
            wanted = layout.checkpointing, layout.shard or layout.offload, layout.offload
            has = own.gradient_checkpointing, own.sharding.enabled, own.sharding.cpu_offload
            for key, new, old in zip(SPREAD, wanted, has, strict=True):
                found += [f"finetune.{key}={str(new).lower()}"] * (new != old)
    return list(dict.fromkeys(found))


def commands(target: Sequence[str], config: RunConfig, chosen: Mapping[str, Choice]) -> list[str]:
    """Lines for a shell, in their order.

    Args:
        target: what `lolcats linearize` is told without the plan: a model, recipe or file, and KEY=VALUE.
        config: the settings that these words give.
        chosen: layout of each stage that is on.
    """
    words = [*target, *settings_of(config, chosen)]
    first, second = (chosen[stage].plan.layout if stage in chosen else None for stage in ("transfer", "finetune"))
    if first is not None and first.block is not None:
        return [*_block_lines(words, first), _line("linearize", [*words, "--resume"], second or Layout())]
    if first is None or second is None or first.ranks == second.ranks:
        return [_line("linearize", words, second or first or Layout())]
    return [
        _line("linearize", [*words, "--until", "transfer"], first),
        _line("linearize", [*words, "--resume"], second),
    ]


def _block_lines(words: list[str], layout: Layout) -> list[str]:
    """Side by side on one host, or as jobs that a cluster starts."""
    if layout.ranks <= GPUS_A_HOST:
        return [_line("block", words, layout)]  # which also puts them together
    target, *settings = words
    one = _line("block", [target, "N", *settings], Layout())
    return [
        _line("block", [*words, "--prepare"], Layout()),
        f"{one}  # for N from 0 on, {layout.ranks} jobs at a time",
        _line("block", [*words, "--stitch"], Layout()),
    ]


def _line(verb: str, words: Sequence[str], layout: Layout) -> str:
    said = shlex.join(words)
    if layout.ranks == 1:
        return f"lolcats {verb} {said}"
    hosts = -(-layout.ranks // GPUS_A_HOST)
    nodes = "" if hosts == 1 else f"--nnodes {hosts} --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
    return f"torchrun {nodes}--nproc-per-node {min(layout.ranks, GPUS_A_HOST)} -m lolcats {verb} {said}"
