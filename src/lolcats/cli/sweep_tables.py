"""The tables of `lolcats sweep`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lolcats.cli.tables import say
from lolcats.cli.terminal import SafeConsole
from lolcats.printable import show_bytes
from lolcats.variants import NAMES, short_label

if TYPE_CHECKING:
    from lolcats.sweep import Plan, Sweep
    from lolcats.sweep import Table as Results

QUALITY = {f"perplexity.{name}": short_label(name) for name in NAMES} | {"kl.student": "KL of student"}
"""Columns of the table of quality, and what they are called; all without a word more are perplexities."""
COST = {
    "tokens_per_second.transfer": "tokens/s, stage 1",
    "tokens_per_second.finetune": "tokens/s, stage 2",
    "seconds.transfer": "seconds, stage 1",
    "seconds.finetune": "seconds, stage 2",
    "seconds.total": "seconds in all",
    "memory.kv_tokens": "KV tokens a text",
}
"""Columns of the table of cost."""
WITH_SPREAD = {"perplexity.transfer", "perplexity.student", "kl.student"}
"""Columns whose standard deviation is shown in the terminal; the files have all of them."""


def print_plan(out: Console, sweep: Sweep, plan: Plan) -> None:
    """What each run will cost, and all together; where stage 1 is that of another run, its number stands for steps."""
    numbers = {run.name: f"as {number}" for number, run in enumerate(plan.runs, start=1)}
    heads = ["", "run", "", "steps 1", "tokens 1", "steps 2", "tokens 2", "time", "disk"]
    rows = []
    for number, run in enumerate(plan.runs, start=1):
        first = numbers.get(run.shares, "shared") if run.shares else f"{run.steps['transfer']:,}"
        counts = [first, f"{run.tokens['transfer']:,}", f"{run.steps['finetune']:,}", f"{run.tokens['finetune']:,}"]
        disk = "?" if run.bytes is None else show_bytes(run.bytes)
        rows.append([str(number), run.name, run.status, *counts, show_time(run.seconds), disk])
    _print_fitted(out, heads, rows, left=3)
    for line in _plan_totals(sweep, plan):
        say(out, line)


def _plan_totals(sweep: Sweep, plan: Plan) -> list[str]:
    """What is left of all runs together, and what the estimate rests on."""
    left = [run for run in plan.runs if run.status != "finished"]
    lines = [
        f"\n{len(plan.runs)} runs in {sweep.folder}, {len(plan.runs) - len(left)} finished; left to train: "
        f"{plan.tokens('transfer'):,} tokens of stage 1, {plan.tokens('finetune'):,} of stage 2"
    ]
    if sweep.measure.anything:
        lines.append(_measure_line(sweep))
    if shared := len([run for run in left if run.shares]):
        lines.append(f"stage 1 is done once for runs that have it in common: {shared} runs need none of their own")
    lines.append(_time_line(plan))
    size = plan.bytes()
    if problems := [f"{run.name} would fail: {run.problem}" for run in plan.runs if run.problem]:
        lines += problems
    elif size is None:
        lines.append("disk: unknown, because the configuration of a model is not on this machine")
    else:
        lines.append(f"disk: {show_bytes(size)} of models and checkpoints when all is done")
    return lines


def _measure_line(sweep: Sweep) -> str:
    """What comes after the training, which the time does not count."""
    measure = sweep.measure
    parts = [", ".join(measure.tasks)] if measure.tasks else []
    parts += [f"{', '.join(measure.recall)} at {', '.join(map(str, measure.lengths))} tokens"] if measure.recall else []
    who = "each student and the teacher" if measure.teacher else "each student"
    return f"{who} will be measured on {'; '.join(parts)}; the time does not count that"


def _time_line(plan: Plan) -> str:
    seconds, speed = plan.seconds(), plan.speed
    if seconds is not None and plan.machine is not None:
        where = f"training alone, computed for one {plan.machine.gpu.name}"
        return f"time: {show_time(seconds)} one after the other, {where}; --calibrate measures a few steps"
    if seconds is None or speed is None:
        return "time: unknown; give --tokens-per-second A,B, --gpu NAME or --calibrate, or ask when a run has finished"
    rest = " and measuring" if speed.other_seconds else "; loading and measuring come on top"
    return (
        f"time: {show_time(seconds)} one after the other, training{rest}, at {speed.transfer:,.0f} and "
        f"{speed.finetune:,.0f} tokens/s ({speed.source})"
    )


def print_results(out: Console, results: Results, shown: dict[str, str], *, with_teachers: bool = False) -> None:
    """A row for each run, or for the mean over its seeds.

    Args:
        shown: column -> what it is called; columns without a number are left out.
        with_teachers: also a row for each teacher, at the end.
    """
    from lolcats.sweep.results import axis_cells, show_number

    known = results.columns()
    columns = [name for name in shown if name in known]
    swept = [axis for axis in results.shown_axes if len(results.axes[axis]) > 1] or results.shown_axes
    rows = []
    for row in [*results.rows, *(results.teachers if with_teachers else [])]:
        spread = {name: value for name, value in row.spread.items() if name in WITH_SPREAD or results.scores.get(name)}
        numbers = []
        for name in columns:
            show = _show_percent if results.scores.get(name) else show_number
            numbers.append(show(row.columns.get(name), spread.get(name)))
        rows.append([*axis_cells(row, swept, "-"), row.status, *numbers])
    heads = [*(axis.rpartition(".")[2] for axis in swept), "", *(shown[name] for name in columns)]
    _print_fitted(out, heads, rows, left=len(swept) + 1)


def _show_percent(value: float | None, spread: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def print_scores(out: Console, results: Results) -> None:
    """The tables of the section `measure`, if there is one: average and main metric of each task, and recall.

    Of controls the averages are shown; the files have all.
    """
    recall = [name for name in results.scores if name.partition(".")[2].isdecimal()]
    averages = [name for name in results.scores if name.startswith("tasks.")]
    tasks = [name for name in results.scores if name not in recall + averages and name.count(".") == 1]
    for title, names in ("tasks, % right", averages + tasks), ("recall, % found", recall):
        if names:
            out.print(f"\n{title}")
            shown = {name: name.removeprefix("tasks.").replace(".", " ") for name in names}
            print_results(out, results, shown, with_teachers=True)


def _print_fitted(out: Console, heads: list[str], rows: list[list[str]], left: int) -> None:
    """A table whose cells may be parted between words, but not inside them; the first `left` columns are text."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    needed = 0
    for place, head in enumerate(heads):
        words = [word for cell in [head, *(row[place] for row in rows)] for word in cell.split()]
        width = max(map(len, words), default=1)
        needed += width + 2
        table.add_column(head, justify="left" if place < left else "right", min_width=width)
    for row in rows:
        table.add_row(*row)
    # A narrower terminal breaks the lines, which loses nothing.
    SafeConsole(width=max(out.width, needed)).print(table, crop=False)


def show_time(seconds: float | None) -> str:
    """Seconds in the two units that matter, such as 2 h 05 min."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
