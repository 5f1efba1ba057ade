"""`lolcats evaluate`: measure a linearized model, its controls and its teacher on the same text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lolcats.cli.load import find_model, read_recipe, silence
from lolcats.cli.options import Device, Dtype, Model
from lolcats.cli.tables import console, position_table, score_table
from lolcats.config import Control, RunConfig
from lolcats.errors import LolcatsError

if TYPE_CHECKING:
    from lolcats.evaluation import Measurement

CONTROLS = ", ".join(get_args(Control))
MOST_SEGMENTS = 32


Sources = Annotated[
    list[str] | None, typer.Option(help="Text to measure on; repeatable. Default: the recipe's, or python-docs.")
]
Length = Annotated[int | None, typer.Option(min=2, help="Tokens a segment. Default: the recipe's, or 1024.")]
Last = Annotated[int | None, typer.Option(min=1, help="Count only the last tokens of a segment.")]
Most = Annotated[int | None, typer.Option(min=1, help=f"Segments to read. Default: the recipe's, or {MOST_SEGMENTS}.")]
Batch = Annotated[int, typer.Option(min=1, help="Segments at once.")]
Controls = Annotated[list[str] | None, typer.Option(help=f"{CONTROLS}, or none; repeatable. Default: all of them.")]
Teacher = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="Default: the one of the recipe; none leaves it out.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers to this file.")]
ByPosition = Annotated[bool, typer.Option("--by-position", help="A second table, by place in the text.")]


def evaluate(
    model: Model,
    sources: Sources = None,
    length: Length = None,
    last: Last = None,
    max_segments: Most = None,
    batch_size: Batch = 4,
    control: Controls = None,
    teacher: Teacher = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
    by_position: ByPosition = False,
) -> None:
    """Perplexity and distance from the teacher, with the controls beside it."""
    controls = _check_controls(control)
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise LolcatsError(f"no folder {json_file.parent} to write {json_file.name} into")
    source = find_model(model)
    recipe = read_recipe(source)
    given = {"sources": sources, "length": length, "last": last, "max_segments": max_segments, "teacher": teacher}
    settings = _settings(recipe, given)

    from lolcats.evaluation.compare import compare

    silence()
    out = console()
    with _progress(out) as show:
        scores = compare(
            source, controls=controls, batch_size=batch_size, device=device, dtype=dtype, progress=show, **settings
        )
    if json_file is not None:
        _write(json_file, source, settings, scores)
    _print_scores(out, scores, recipe, settings["sources"])
    if by_position:
        out.print("\nperplexity by place in the text")
        out.print(position_table({name: score.by_position for name, score in scores.items()}))


@contextmanager
def _progress(out: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar of segments; what it yields takes (done, all)."""
    columns = (TextColumn("segments"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bars:
        bar = bars.add_task("segments", total=None)
        yield lambda done, count: bars.update(bar, completed=done, total=count)


def _print_scores(out: Console, scores: dict[str, Measurement], recipe: RunConfig | None, sources: list[str]) -> None:
    learned = [] if recipe is None else [name for name in sources if name in recipe.data.source_names]
    note = f" (the model was trained on text of {', '.join(learned)})" if learned else ""
    tokens = next(iter(scores.values())).tokens
    out.print(score_table({n: s.perplexity for n, s in scores.items()}, {n: s.kl for n, s in scores.items()}, recipe))
    out.print(f"\n{tokens:,} tokens of {', '.join(sources)}{note}", markup=False)


def _check_controls(control: list[str] | None) -> list[str]:
    if control is None:
        return list(get_args(Control))
    chosen = [name for name in control if name != "none"]
    if unknown := [name for name in chosen if name not in get_args(Control)]:
        raise LolcatsError(f"unknown control {', '.join(unknown)}; expected {CONTROLS}, or none")
    return chosen


def _settings(recipe: RunConfig | None, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `compare`: what the options leave open comes from the recipe, `last` only with its length."""
    chosen: dict[str, Any] = {"sources": ["python-docs"], "length": 1024, "last": None, "max_segments": MOST_SEGMENTS}
    chosen["teacher"] = None
    if recipe is not None:
        e = recipe.evaluation
        known = {"sources": e.sources, "length": e.segment_length or recipe.data.sequence_length, "last": e.last}
        known |= {"max_segments": e.max_segments, "teacher": recipe.model}
        chosen |= {name: value for name, value in known.items() if value}
        chosen["last"] = e.last if given["length"] is None else None
    chosen |= {name: value for name, value in given.items() if value}
    return chosen | {"teacher": None if chosen["teacher"] == "none" else chosen["teacher"]}


def _write(file: Path, model: str, settings: dict[str, Any], scores: dict[str, Measurement]) -> None:
    from lolcats.run_folder import write_text

    content = {"model": model, **settings, "scores": {name: asdict(score) for name, score in scores.items()}}
    write_text(file, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no infinity; an infinite perplexity is written as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
