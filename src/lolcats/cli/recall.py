"""`lolcats evaluate --recall`: passkeys and needles, answered by a model, its controls and its teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from lolcats.cli.failures import Interrupted
from lolcats.cli.load import read_recipe, silence
from lolcats.cli.options import MAX_SEED, expand_path
from lolcats.cli.tables import console
from lolcats.config.variants import ordered, short_label
from lolcats.errors import LolcatsError

if TYPE_CHECKING:
    from lolcats.evaluation.recall import Cell, RecallSettings

LENGTHS = "512,1024,2048"
Recall = Annotated[
    str | None,
    typer.Option(
        metavar="TASKS",
        help="Instead of perplexity, recall by generation: passkey, niah_single_1, niah_single_2, niah_single_3, "
        "niah_multikey, niah_multiquery, vt, or all; joined by commas.",
    ),
]
Lengths = Annotated[
    str, typer.Option(metavar="N,N,...", help="With --recall: tokens of prompt and answer, joined by commas.")
]
Samples = Annotated[int, typer.Option(min=1, help="With --recall: prompts per task and length.")]
Depths = Annotated[int, typer.Option(min=1, help="With --recall: ranges of depth that the prompts are spread over.")]
RecallSeed = Annotated[int, typer.Option("--recall-seed", min=0, max=MAX_SEED, help="With --recall: of the prompts.")]
Haystack = Annotated[
    str, typer.Option(metavar="SOURCE", help="With --recall: prose for the niah tasks from niah_single_2 on.")
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", callback=expand_path, help="With --recall: heat maps, length x depth (.png, .pdf or .svg)."
    ),
]
BeyondContext = Annotated[
    bool, typer.Option("--beyond-context", help="With --recall: allow lengths beyond the model's context.")
]


@dataclass
class RecallRun:
    """A command, checked as far as that goes without the model."""

    source: str
    teacher: str | None
    controls: list[str]
    settings: RecallSettings
    batch_size: int
    device: str
    dtype: str
    json_file: Path | None
    plot: Path | None


def check_mixture(recall: str | None, perplexity_options: dict[str, Any], recall_options: dict[str, Any]) -> None:
    """Refuse options that would be ignored.

    Args:
        recall: of the command.
        perplexity_options, recall_options: values by the name of the option; those that were not given are false.

    Raises:
        LolcatsError: options of perplexity with --recall, or the other way round.
    """
    given = [name for name, value in (recall_options if recall is None else perplexity_options).items() if value]
    if given and recall is None:
        raise LolcatsError(f"{', '.join(given)} goes with --recall; add for instance --recall passkey")
    if given:
        raise LolcatsError(
            f"{', '.join(given)} goes with perplexity, not with --recall, which has --lengths and --samples"
        )


def read_settings(
    tasks: str, lengths: str, samples: int, depths: int, seed: int, haystack: str, beyond_context: bool
) -> RecallSettings:
    """Settings from the texts of the options.

    Raises:
        LolcatsError: an unknown task, or lengths that are not numbers.
    """
    from lolcats.evaluation.recall import RecallSettings, check_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise LolcatsError("--recall names no task; for instance --recall passkey,niah_single_1")
    words = [word.strip() for word in lengths.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and len(word) < 10 and int(word) > 0 for word in words):
        raise LolcatsError(f"--lengths must be numbers of tokens such as 512,1024,2048; got {lengths!r}")
    numbers = sorted({int(word) for word in words})
    return RecallSettings(check_tasks(names), numbers, samples, depths, seed, haystack, beyond_context)


def evaluate_recall(run: RecallRun) -> None:
    """Measure, print the tables, write the files.

    Raises:
        LolcatsError: what `recall` and `plot_recall` raise.
        Interrupted: Ctrl-C where finished cells are kept.
    """
    from lolcats.evaluation.compare import load_variants
    from lolcats.evaluation.recall import Progress as Kept
    from lolcats.evaluation.recall import check_haystack, recall
    from lolcats.evaluation.recall.plot import check_plot, plot_recall

    if run.plot is not None:
        check_plot(run.plot, run.settings.tasks)
    check_haystack(run.settings)
    progress_file = None if run.json_file is None else run.json_file.with_name(run.json_file.name + ".progress")
    kept = Kept(progress_file, _identity(run))
    silence()
    out = console()
    with _resumable(progress_file), _bar(out) as report:
        loaded = load_variants(
            run.source, teacher=run.teacher, controls=run.controls, device=run.device, dtype=run.dtype
        )
        rest = {"batch_size": run.batch_size, "progress": kept, "report": report}
        cells = recall(loaded.variants, loaded.tokenizer, run.settings, **rest)
    if run.json_file is not None:
        _write(run.json_file, run, cells)
    _print(out, cells, run)
    if run.plot is not None:
        plot_recall(cells, run.plot, short_label)
        out.print(f"\nheat maps: {run.plot}", markup=False)
    kept.finish()


def _identity(run: RecallRun) -> dict[str, Any]:
    """All that an answer depends on; tasks and lengths may change, because every cell says its own."""
    s = run.settings
    folder = Path(run.source)
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    newest = max((file.stat().st_mtime for file in weights), default=0)
    changed = datetime.fromtimestamp(newest).isoformat(" ", "seconds") if weights else None
    names = {"model": run.source, "weights of": changed, "teacher": run.teacher, "format": run.dtype}
    return names | {"samples": s.samples, "depths": s.depths, "seed": s.seed, "haystack": s.haystack}


@contextmanager
def _resumable(progress_file: Path | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        if progress_file is None:
            raise
        raise Interrupted("evaluate --recall") from error


@contextmanager
def _bar(out: Console) -> Iterator[Callable[[str, int, int], None]]:
    columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bars:
        bar = bars.add_task("loading the model", total=None)
        yield lambda name, done, count: bars.update(bar, description=name, completed=done, total=count)


def _write(file: Path, run: RecallRun, cells: list[Cell]) -> None:
    from lolcats.files import write_text

    content = {"model": run.source, "teacher": run.teacher, **asdict(run.settings)}
    content["cells"] = [asdict(cell) for cell in cells]
    write_text(file, json.dumps(content, indent=1) + "\n")


def _print(out: Console, cells: list[Cell], run: RecallRun) -> None:
    out.print(_summary_table(cells))
    for task in dict.fromkeys(cell.task for cell in cells if cell.by_depth and run.settings.depths > 1):
        out.print(f"\n{task} by depth of the needle in %: % found")
        out.print(_depth_table([cell for cell in cells if cell.task == task]))
    s = run.settings
    out.print(f"\n% found, {s.samples} prompts per task and length, seed {s.seed}; greedy answers")
    if note := _note(run):
        out.print(note)


def _note(run: RecallRun) -> str:
    recipe = read_recipe(run.source)
    if recipe is None or max(run.settings.lengths) <= recipe.data.sequence_length:
        return ""
    return f"from {recipe.data.sequence_length:,} tokens on: beyond the texts of the linearization"


def _summary_table(cells: list[Cell]) -> Table:
    """A row a task and length, a column a variant."""
    names = ordered(dict.fromkeys(cell.variant for cell in cells))
    table = Table("task", box=None, header_style="bold")
    table.add_column("tokens", justify="right")
    for name in names:
        table.add_column(short_label(name), justify="right")
    score = {(cell.task, cell.length, cell.variant): cell.score for cell in cells}
    for task, length in dict.fromkeys((cell.task, cell.length) for cell in cells):
        table.add_row(task, f"{length:,}", *(f"{100 * score[task, length, name]:.1f}" for name in names))
    return table


def _depth_table(cells: list[Cell]) -> Table:
    """A row a variant and length, a column a range of depth."""
    table = Table(Column("", no_wrap=True), box=None, header_style="bold")
    table.add_column("tokens", justify="right")
    count = len(cells[0].by_depth)
    for number in range(count):
        table.add_column(f"{round(100 * number / count)}-{round(100 * (number + 1) / count)}", justify="right")
    for name in ordered(dict.fromkeys(cell.variant for cell in cells)):
        for cell in (cell for cell in cells if cell.variant == name):
            shown = ("-" if value is None else f"{100 * value:.0f}" for value in cell.by_depth)
            table.add_row(short_label(name), f"{cell.length:,}", *shown)
    return table
