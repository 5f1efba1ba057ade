"""`lolcats sweep`: many runs from one file; and `lolcats sweep-job`, which its --jobs starts for each run."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lolcats.cli.failures import describe
from lolcats.cli.sweep_tables import COST, QUALITY, print_plan, print_results, print_scores
from lolcats.cli.tables import console, say
from lolcats.errors import LolcatsError

if TYPE_CHECKING:
    from lolcats.sweep import Speed, Sweep, SweepRun, Table

File = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The sweep file; docs/sweeps.md explains it.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings of every run; name= and runs_dir= of the sweep."),
]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Show runs, steps, tokens, time and disk; run nothing.")]
TokensPerSecond = Annotated[
    str | None, typer.Option(metavar="A,B", help="With --plan: speed of stage 1 and stage 2, for the time.")
]
Calibrate = Annotated[bool, typer.Option("--calibrate", help="With --plan: measure the speed in a few steps.")]
Gpu = Annotated[
    str | None, typer.Option(metavar="NAME", help="With --plan: compute the time for this GPU, if no speed is known.")
]
Only = Annotated[
    list[str] | None, typer.Option(metavar="RUN", help="Only runs with this name, or pattern (*); repeatable.")
]
Overwrite = Annotated[
    list[str] | None, typer.Option(metavar="RUN", help="Delete these runs first: a name or pattern; repeatable.")
]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time, each a process with a log file.")]
NoShare = Annotated[bool, typer.Option("--no-share", help="Do a stage 1 that runs have in common in each of them.")]
TableOnly = Annotated[bool, typer.Option("--table", help="Only gather and show what is finished; run nothing.")]


def sweep(
    config: File,
    overrides: Overrides = None,
    plan: PlanOnly = False,
    tokens_per_second: TokensPerSecond = None,
    calibrate: Calibrate = False,
    gpu: Gpu = None,
    table: TableOnly = False,
    only: Only = None,
    overwrite: Overwrite = None,
    jobs: Jobs = 1,
    no_share: NoShare = False,
) -> None:
    """Run a grid or list of runs, each in its own folder; the same command goes on where it was interrupted."""
    _check_options(plan, table, calibrate, tokens_per_second, gpu, overwrite)
    from lolcats.sweep import choose_runs, load_sweep, run_sweep

    chosen = load_sweep(config, overrides or [])
    runs = choose_runs(chosen, only) if only else chosen.runs
    out = console()
    if plan:
        _show_plan(out, chosen, runs, tokens_per_second, calibrate, gpu, not no_share)
        return
    if table:
        gathered = _gather(chosen)
    else:
        gathered = run_sweep(
            chosen, config, only=only or [], overwrite=overwrite or [], jobs=jobs, share=not no_share,
            describe=describe, console=out,
        )  # fmt: skip
    _show_results(out, chosen, gathered)
    _refuse_failures(gathered, [run.name for run in runs])


def _check_options(
    plan: bool,
    table: bool,
    calibrate: bool,
    tokens_per_second: str | None,
    gpu: str | None,
    overwrite: list[str] | None,
) -> None:
    if (calibrate or tokens_per_second or gpu) and not plan:
        raise typer.BadParameter("--calibrate, --gpu and --tokens-per-second belong to --plan")
    if gpu and (calibrate or tokens_per_second):
        raise typer.BadParameter("--gpu computes the speed that --calibrate or --tokens-per-second gives; give one")
    if calibrate and tokens_per_second:
        raise typer.BadParameter("--calibrate measures the speed that --tokens-per-second gives; give one of them")
    if plan and table:
        raise typer.BadParameter("--plan looks ahead and --table back; give one of them")
    if (plan or table) and overwrite:
        raise typer.BadParameter("--plan and --table run nothing, and --overwrite deletes runs; give one of them")


def _show_plan(
    out: Console,
    chosen: Sweep,
    runs: list[SweepRun],
    given: str | None,
    calibrated: bool,
    gpu: str | None,
    share: bool,
) -> None:
    from lolcats.planning import choose_machine
    from lolcats.sweep import calibrate, check_measure, check_runs, make_plan

    check_runs(chosen)
    check_measure(chosen, fetch=False)
    speed = _read_speed(given) if given else calibrate(runs) if calibrated else None
    plan = make_plan(chosen, runs, speed, share, None if gpu is None else choose_machine(gpu))
    print_plan(out, chosen, plan)


def _read_speed(text: str) -> Speed:
    from lolcats.sweep import Speed

    try:
        first, second = (float(part.replace("_", "")) for part in text.split(","))
    except ValueError:
        first = second = 0.0
    if min(first, second) <= 0:
        raise LolcatsError(f"--tokens-per-second: expected two numbers above 0, such as 300000,80000; got {text!r}")
    return Speed(first, second, "given")


def _gather(chosen: Sweep) -> Table:
    from lolcats.sweep import check_runs, gather, read_failures, write_table

    check_runs(chosen)
    if not chosen.folder.exists():
        raise LolcatsError(f"no folder {chosen.folder}: nothing of this sweep has been run")
    gathered = gather(chosen, read_failures(chosen))
    write_table(chosen, gathered)
    return gathered


def _show_results(out: Console, chosen: Sweep, gathered: Table) -> None:
    from lolcats.sweep import draw_plots

    out.print()
    print_results(out, gathered, QUALITY)
    out.print()
    print_results(out, gathered, COST)
    print_scores(out, gathered)
    written = ["results.json", "results.csv", "results.md", *(["means.csv"] if gathered.means else [])]
    try:
        written += [file.name for file in draw_plots(gathered, chosen.folder)]
    except LolcatsError as error:
        say(out, f"\n{error}")
    say(out, f"\n{chosen.folder}: {', '.join(written)}")


def _refuse_failures(gathered: Table, names: list[str]) -> None:
    """The exit code of a sweep with failed runs is that of an error."""
    rows = [*gathered.teachers, *(row for row in gathered.runs if row.name in names)]
    failed = [row for row in rows if row.error]
    if failed:
        first = "; ".join(f"{row.name}: {row.error}" for row in failed[:3])
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        count = len(failed) if failed[0] in gathered.teachers else f"{len(failed)} of {len(names)}"
        raise LolcatsError(f"{count} runs failed: {first}{more}")


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
    sweep = load_sweep(config)
    job = find_job(sweep, name)
    with hold_job(sweep, name):
        do_job(job, console())
