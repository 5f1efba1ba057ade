"""`lolcats sweep-job`: what `lolcats sweep --jobs` starts for each run."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from lolcats.cli.load import silence
from lolcats.cli.tables import console


def sweep_job(
    config: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="The sweep that a sweep wrote down.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of one of its runs, or of a teacher.")],
    attached: Annotated[bool, typer.Option("--attached", help="End when standard input does.")] = False,
) -> None:
    """Do one run of a sweep with its measurements, or measure a teacher; goes on where it was interrupted."""
    from lolcats.sweep import do_job, find_job, hold_job, load_sweep
    from lolcats.sweep.attached import end_with_parent

    if attached:
        end_with_parent()
    # A shell's background jobs ignore interruptions, and so would this process: the sweep ends its jobs by one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    silence()
    sweep = load_sweep(config)
    job = find_job(sweep, name)
    with hold_job(sweep, name):
        do_job(job, console())
