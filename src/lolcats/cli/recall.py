"""`lolcats recall`: passkeys and needles, answered by a model, its controls and its teacher."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from lolcats.cli.options import MAX_SEED, Device, DeviceMapName, Dtype, Model, check_target, split_words
from lolcats.cli.suite import (
    Controls,
    JsonFile,
    Subject,
    Teacher,
    bar,
    find_subject,
    print_beyond,
    print_memory,
    progress_file,
    say_left_out,
)
from lolcats.cli.tables import console, number_table
from lolcats.errors import LolcatsError
from lolcats.files import write_json
from lolcats.variants import ordered, short_label

if TYPE_CHECKING:
    from lolcats.evaluation.recall import Cell, RecallSettings

Tasks = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TASK]...",
        help="passkey (the default), niah_single_1, niah_single_2, niah_single_3, niah_multikey, niah_multiquery, vt, "
        "or all; also a,b.",
    ),
]
Lengths = Annotated[str, typer.Option(metavar="N,N,...", help="Tokens of prompt and answer, joined by commas.")]
Samples = Annotated[int, typer.Option(min=1, help="Prompts per task and length.")]
Depths = Annotated[int, typer.Option(min=1, help="Ranges of depth that the prompts are spread over.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the prompts.")]
Haystack = Annotated[str, typer.Option(metavar="SOURCE", help="Prose for the niah tasks from niah_single_2 on.")]
Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", callback=check_target, help="Heat maps, length x depth (.png, .pdf or .svg)."),
]
Beyond = Annotated[bool, typer.Option("--beyond-context", help="Allow lengths beyond the model's context.")]
Batch = Annotated[int, typer.Option(min=1, help="Prompts at once.")]


def recall(
    model: Model,
    tasks: Tasks = None,
    lengths: Lengths = "512,1024,2048",
    samples: Samples = 20,
    depths: Depths = 10,
    seed: Seed = 0,
    haystack: Haystack = "python-docs",
    plot: Plot = None,
    beyond_context: Beyond = False,
    batch_size: Batch = 4,
    control: Controls = None,
    teacher: Teacher = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMapName = None,
    json_file: JsonFile = None,
) -> None:
    """Recall by generation: what a model finds again in long texts; goes on where it was interrupted."""
    subject = find_subject(model, teacher, control)
    from lolcats.evaluation import recall as library
    from lolcats.evaluation.compare import load_variants
    from lolcats.evaluation.recall.plot import check_plot, plot_recall
    from lolcats.evaluation.store import AnswerStore

    if not (words := split_words(tasks or ["passkey"])):
        raise LolcatsError("no task is named; expected such as passkey,niah_single_1")
    names = library.check_tasks(words)
    settings = library.RecallSettings(names, _read_lengths(lengths), samples, depths, seed, haystack, beyond_context)
    if plot is not None:
        check_plot(plot, names)
    library.check_haystack(settings)
    out = console()
    say_left_out(out, subject)
    file = progress_file(out, json_file, "recall", subject.source, subject.teacher, subject.controls)
    with AnswerStore(file) as store:
        with bar(out, "loading the model") as report:
            loaded = load_variants(subject.source, **subject.keywords(device, dtype, device_map))
            how = {"batch_size": batch_size, "store": store, "report": report}
            cells = library.recall(loaded.variants, loaded.tokenizer, settings, **how)
        if json_file is not None:
            content = {"model": subject.source, "teacher": subject.teacher, **asdict(settings)}
            write_json(json_file, content | {"cells": [asdict(cell) for cell in cells]})
    _print(out, cells, settings, subject)
    print_memory(out, loaded.memory)
    if plot is not None:
        plot_recall(cells, plot, short_label)
        out.print(f"\nheat maps: {plot}")


def _read_lengths(text: str) -> list[int]:
    words = split_words([text])
    if not words or not all(word.isdecimal() and len(word) < 10 and int(word) > 0 for word in words):
        raise LolcatsError(f"--lengths must be numbers of tokens such as 512,1024,2048; got {text!r}")
    return sorted({int(word) for word in words})


def _print(out: Console, cells: list[Cell], settings: RecallSettings, subject: Subject) -> None:
    out.print(_summary_table(cells))
    for task in dict.fromkeys(cell.task for cell in cells if cell.by_depth and settings.depths > 1):
        out.print(f"\n{task} by depth of the needle in %: % found")
        out.print(_depth_table([cell for cell in cells if cell.task == task]))
    out.print(f"\n% found, {settings.samples} prompts per task and length, seed {settings.seed}; greedy answers")
    print_beyond(out, max(settings.lengths), subject)


def _summary_table(cells: list[Cell]) -> Table:
    """A row a task and length, a column a variant."""
    names = ordered(dict.fromkeys(cell.variant for cell in cells))
    table = number_table(["task"], ["tokens", *map(short_label, names)])
    score = {(cell.task, cell.length, cell.variant): cell.score for cell in cells}
    for task, length in dict.fromkeys((cell.task, cell.length) for cell in cells):
        table.add_row(task, f"{length:,}", *(f"{100 * score[task, length, name]:.1f}" for name in names))
    return table


def _depth_table(cells: list[Cell]) -> Table:
    """A row a variant and length, a column a range of depth."""
    edges = [round(100 * number / len(cells[0].by_depth)) for number in range(len(cells[0].by_depth) + 1)]
    table = number_table([Column("", no_wrap=True)], ["tokens", *(f"{a}-{b}" for a, b in pairwise(edges))])
    for name in ordered(dict.fromkeys(cell.variant for cell in cells)):
        for cell in (cell for cell in cells if cell.variant == name):
            shown = ("-" if value is None else f"{100 * value:.0f}" for value in cell.by_depth)
            table.add_row(short_label(name), f"{cell.length:,}", *shown)
    return table
