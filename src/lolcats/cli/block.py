"""`lolcats block`: stage 1 by blocks of layers, each as a job of its own or side by side under `torchrun`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lolcats.cli.linearize import read_target
from lolcats.cli.tables import console, say

if TYPE_CHECKING:
    from lolcats.runs.blocks.jobs import Job


def block(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A YAML file, a recipe or a model, as for linearize.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[N] [KEY=VALUE]...", help="The block, from 0; and settings. Without N all blocks."),
    ] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Find out what is needed before the first block, and train none.")
    ] = False,
    stitch: Annotated[
        bool, typer.Option("--stitch", help="Put all trained blocks together, for linearize --resume.")
    ] = False,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Wait for hidden states that no job makes yet.")
    ] = 0.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="With --prepare: delete the run first.")] = False,
) -> None:
    """Train blocks of layers apart: one, this process's share under torchrun, or all; needs transfer.blocks.size."""
    words = words or []
    number = int(words[0]) if words and words[0].isdigit() else None
    if sum([prepare, stitch, number is not None]) > 1:
        raise typer.BadParameter("a block's number, --prepare and --stitch are different jobs; give one of them")
    if overwrite and not prepare:
        raise typer.BadParameter("--overwrite deletes a run before it is prepared; give it with --prepare")
    config = read_target(target, words if number is None else words[1:])
    job: Job = "prepare" if prepare else "stitch" if stitch else number

    from lolcats.runs.blocks import run_blocks

    out = console()
    folder = run_blocks(config, job, wait=wait, overwrite=overwrite, console=out)
    say(out, f"run: {folder.path}")
