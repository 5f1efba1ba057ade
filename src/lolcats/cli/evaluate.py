"""`lolcats evaluate`: measure a linearized model, its controls and its teacher on the same text."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lolcats.cli.load import find_model, read_recipe, silence
from lolcats.cli.options import Device, Dtype, Model
from lolcats.cli.tables import console, position_table, score_table
from lolcats.config import Control, RunConfig
from lolcats.errors import LolcatsError

if TYPE_CHECKING:
    from lolcats.evaluation import Measurement

CONTROLS = ", ".join(get_args(Control))


def evaluate(
    model: Model,
    sources: Annotated[
        list[str] | None, typer.Option(help="Text to measure on; repeatable. Default: the recipe's, or python-docs.")
    ] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens a segment. Default: the recipe's, or 1024.")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Count only the last tokens of a segment.")] = None,
    max_segments: Annotated[int | None, typer.Option(min=1, help="Read at most this many segments.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Segments at once.")] = 4,
    control: Annotated[
        list[str] | None, typer.Option(help=f"{CONTROLS}, or none; repeatable. Default: all of them.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Default: the one of the recipe; none leaves it out.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers to this file.")
    ] = None,
    by_position: Annotated[bool, typer.Option("--by-position", help="A second table, by place in the text.")] = False,
) -> None:
    """Perplexity and distance from the teacher, with the controls beside it."""
    controls = _check_controls(control)
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise LolcatsError(f"no folder {json_file.parent} to write {json_file.name} into")
    source = find_model(model)
    recipe = read_recipe(source)
    settings = _settings(recipe, sources, length, last, max_segments, teacher)

    from lolcats.evaluation.compare import compare

    silence()
    out = console()
    columns = (TextColumn("segments"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as bars:
        bar = bars.add_task("segments", total=None)
        scores = compare(
            source, controls=controls, batch_size=batch_size, device=device, dtype=dtype,
            progress=lambda done, count: bars.update(bar, completed=done, total=count), **settings,
        )  # fmt: skip
    out.print(score_table({n: s.perplexity for n, s in scores.items()}, {n: s.kl for n, s in scores.items()}, recipe))
    counted = next(iter(scores.values())).tokens
    out.print(f"\n{counted:,} tokens of {', '.join(settings['sources'])}{_warning(recipe, settings)}", markup=False)
    if by_position:
        out.print("\nperplexity by place in the text", markup=False)
        out.print(position_table({name: score.by_position for name, score in scores.items()}))
    if json_file is not None:
        _write(json_file, source, settings, scores)


def _check_controls(control: list[str] | None) -> list[str]:
    if control is None:
        return list(get_args(Control))
    chosen = [name for name in control if name != "none"]
    if unknown := [name for name in chosen if name not in get_args(Control)]:
        raise LolcatsError(f"unknown control {', '.join(unknown)}; expected {CONTROLS}, or none")
    return chosen


def _settings(
    recipe: RunConfig | None,
    sources: list[str] | None,
    length: int | None,
    last: int | None,
    max_segments: int | None,
    teacher: str | None,
) -> dict[str, Any]:
    """What the options leave open comes from the recipe; "last" only where the length does too."""
    if recipe is None:
        chosen: dict[str, Any] = {"sources": ["python-docs"], "length": 1024, "last": None, "teacher": None}
    else:
        e = recipe.evaluation
        default_length = e.segment_length or recipe.data.sequence_length
        chosen = {"sources": e.sources or ["python-docs"], "length": default_length, "teacher": recipe.model}
        chosen["last"] = e.last if length is None else None
    given = {"sources": sources or None, "length": length, "last": last, "teacher": teacher}
    chosen |= {name: value for name, value in given.items() if value is not None}
    chosen["teacher"] = None if chosen["teacher"] == "none" else chosen["teacher"]
    return chosen | {"max_segments": max_segments}


def _warning(recipe: RunConfig | None, settings: dict[str, Any]) -> str:
    learned = [] if recipe is None else [name for name in settings["sources"] if name in recipe.data.sources]
    return f" (the model was trained on text of {', '.join(learned)})" if learned else ""


def _write(file: Path, model: str, settings: dict[str, Any], scores: dict[str, Measurement]) -> None:
    from lolcats.run_folder import write_text

    content = {"model": model, **settings, "scores": {name: asdict(score) for name, score in scores.items()}}
    write_text(file, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no infinity; an infinite perplexity is written as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
