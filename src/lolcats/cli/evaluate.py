"""`lolcats evaluate`: measure a linearized model, its controls and its teacher on the same text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lolcats.cli import benchmarks
from lolcats.cli import recall as recall_options
from lolcats.cli.load import find_model, read_recipe, silence
from lolcats.cli.options import Device, Dtype, Model, check_target, expand_path
from lolcats.cli.tables import console, position_notes, position_table, score_table
from lolcats.config import CONTROLS, RunConfig
from lolcats.errors import LolcatsError

if TYPE_CHECKING:
    from lolcats.evaluation import Measurement

MOST_SEGMENTS = 32


Sources = Annotated[
    list[str] | None,
    typer.Option(help="Text to measure on; repeatable. Default: as the recipe measures, else python-docs."),
]
Local = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PATH", help="Read this copy of a data set of --sources; repeatable. Also: the recipe's."
    ),
]
Length = Annotated[int | None, typer.Option(min=2, help="Tokens per segment. Default: the recipe's, or 1024.")]
Last = Annotated[int | None, typer.Option(min=1, help="Count only the last tokens of a segment.")]
Most = Annotated[
    int | None, typer.Option(min=1, help=f"Segments to read. Default: as the recipe; {MOST_SEGMENTS} of other text.")
]
Batch = Annotated[
    int | None,
    typer.Option(min=1, help="Segments or --tasks requests at once. Default: the recipe's, else 4; of requests 1."),
]
Controls = Annotated[
    list[str] | None, typer.Option(help=f"{', '.join(CONTROLS)}, or none; repeatable. Default: all of them.")
]
Teacher = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="Default: the one of the recipe; none leaves it out.")
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", callback=expand_path, help="Also write the numbers to this file."),
]
ByPosition = Annotated[bool, typer.Option("--by-position", help="A second table, by place in the text.")]
Beyond = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Perplexity by position on segments N times as long as in training."),
]


def evaluate(
    model: Model,
    sources: Sources = None,
    local: Local = None,
    length: Length = None,
    last: Last = None,
    max_segments: Most = None,
    batch_size: Batch = None,
    control: Controls = None,
    teacher: Teacher = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
    by_position: ByPosition = False,
    tasks: benchmarks.Tasks = None,
    task_data: benchmarks.TaskData = None,
    num_fewshot: benchmarks.NumFewshot = None,
    seeds: benchmarks.Seeds = None,
    limit: benchmarks.Limit = None,
    chat: benchmarks.Chat = False,
    truncate: benchmarks.Truncate = False,
    task_code: benchmarks.TaskCode = False,
    beyond: Beyond = None,
    recall: recall_options.Recall = None,
    lengths: recall_options.Lengths = recall_options.LENGTHS,
    samples: recall_options.Samples = 20,
    depths: recall_options.Depths = 10,
    recall_seed: recall_options.RecallSeed = 0,
    haystack: recall_options.Haystack = "python-docs",
    plot: recall_options.Plot = None,
    beyond_context: recall_options.BeyondContext = False,
) -> None:
    """Perplexity and distance from the teacher, benchmarks (--tasks) or recall (--recall), with the controls."""
    if tasks and recall is not None:
        raise LolcatsError("--tasks and --recall are measured apart: give one of them, then the other")
    own = {"--sources": sources, "--local": local, "--length": length, "--last": last, "--max-segments": max_segments}
    own |= {"--by-position": by_position, "--beyond": beyond}
    others = {"--lengths": lengths != recall_options.LENGTHS, "--plot": plot, "--beyond-context": beyond_context}
    recall_options.check_mixture(recall, own, others)
    controls = _check_controls(control)
    json_file, plot = (check_target(file) for file in (json_file, plot))
    source = find_model(model)
    recipe = read_recipe(source)
    trained = recipe.data.sequence_length if recipe is not None else None
    if beyond is not None:
        length, by_position = _beyond(trained, beyond, length), True
    given = {
        "sources": sources,
        "local": _local(local),
        "length": length,
        "last": last,
        "max_segments": max_segments,
        "teacher": teacher,
    }
    settings = _settings(recipe, given)
    if local:
        _check_local(given["local"], settings["sources"] or (recipe.data.source_names if recipe is not None else []))
    if recall is not None:
        asked = recall_options.read_settings(recall, lengths, samples, depths, recall_seed, haystack, beyond_context)
        rest = (settings["teacher"], controls, asked, batch_size or 4, device, dtype, json_file, plot)
        return recall_options.evaluate_recall(recall_options.RecallRun(source, *rest))
    wanted = benchmarks.Wanted(tasks, task_data, num_fewshot, seeds, limit, chat, truncate, task_code)
    if wanted.check(given | {"by_position": by_position}):
        benchmarks.measure(source, wanted, settings["teacher"], controls, batch_size or 1, device, dtype, json_file)
        return
    batch = batch_size or (recipe.evaluation.batch_size if recipe is not None else 4)
    options = {"controls": controls, "batch_size": batch, "device": device, "dtype": dtype}
    _measure_text(source, recipe, settings, options, json_file, by_position, by_default=sources is None)


def _measure_text(
    source: str,
    recipe: RunConfig | None,
    settings: dict[str, Any],
    options: dict[str, Any],
    json_file: Path | None,
    by_position: bool,
    by_default: bool,
) -> None:
    """Perplexity and distance from the teacher."""
    from lolcats.evaluation.compare import compare

    silence()
    out = console()
    trained = recipe.data.sequence_length if recipe is not None else None
    held_out = None if settings["sources"] else recipe
    with _progress(out) as show:
        options |= {"edges": [trained] if trained else [], "held_out": held_out}
        scores = compare(source, progress=show, **options, **settings)
    if json_file is not None:
        _write(json_file, source, settings, scores)
    _print_scores(out, scores, recipe, settings["sources"], by_default)
    if by_position:
        _print_positions(out, scores, settings["length"], trained)


def _print_positions(out: Console, scores: dict[str, Measurement], length: int, trained: int | None) -> None:
    out.print("\nperplexity by place in the text")
    out.print(position_table({name: score.by_position for name, score in scores.items()}))
    for note in position_notes(length, trained, next(iter(scores.values())).context):
        out.print(note)


def _beyond(trained: int | None, times: int, length: int | None) -> int:
    if trained is None or length is not None:
        raise LolcatsError(
            "--beyond goes by the training texts of a linearized model and sets the length; give --length alone"
        )
    return times * trained


@contextmanager
def _progress(out: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar of segments; what it yields takes (done, all)."""
    columns = (TextColumn("segments"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bars:
        bar = bars.add_task("segments", total=None)
        yield lambda done, count: bars.update(bar, completed=done, total=count)


def _print_scores(
    out: Console, scores: dict[str, Measurement], recipe: RunConfig | None, sources: list[str], by_default: bool
) -> None:
    learned = [] if recipe is None else [name for name in sources if name in recipe.data.source_names]
    note = f" (the model was trained on text of {', '.join(learned)})" if learned else ""
    names = ", ".join(sources)
    if recipe is None and by_default:
        note = ", the default text; --sources names other"
    if recipe is not None and not sources:
        names = f"the text of {', '.join(recipe.data.source_names)} that was held out from training"
    tokens = next(iter(scores.values())).tokens
    out.print(score_table({n: s.perplexity for n, s in scores.items()}, {n: s.kl for n, s in scores.items()}, recipe))
    out.print(f"\n{tokens:,} tokens of {names}{note}", markup=False, soft_wrap=True)


def _check_controls(control: list[str] | None) -> list[str]:
    if control is None:
        return list(CONTROLS)
    chosen = [name for name in control if name != "none"]
    if unknown := [name for name in chosen if name not in CONTROLS]:
        raise LolcatsError(f"unknown control {', '.join(unknown)}; expected {', '.join(CONTROLS)}, or none")
    return chosen


def _settings(recipe: RunConfig | None, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `compare`: what the options leave open comes from the recipe, `last` only with its length.

    Without sources it is the text that the run of the recipe held out. Of its own text a recipe without `max_segments`
    takes all.
    """
    chosen: dict[str, Any] = {"sources": ["python-docs"], "length": 1024, "last": None, "max_segments": MOST_SEGMENTS}
    chosen |= {"teacher": None, "local": {}}
    if recipe is not None:
        e = recipe.evaluation
        known = {"sources": e.sources, "length": e.segment_length or recipe.data.sequence_length, "last": e.last}
        known |= {"max_segments": e.max_segments, "teacher": recipe.model}
        given = given | {"local": recipe.data.local | given["local"]}
        chosen |= known
        if known["max_segments"] is None and given["sources"] not in (None, e.sources):
            chosen["max_segments"] = MOST_SEGMENTS
        chosen["last"] = e.last if given["length"] is None else None
    chosen |= {name: value for name, value in given.items() if value}
    return chosen | {"teacher": None if chosen["teacher"] == "none" else chosen["teacher"]}


def _local(words: list[str] | None) -> dict[str, str]:
    """Name of a data set -> its copy on this machine."""
    copies: dict[str, str] = {}
    for word in words or []:
        name, _, path = word.partition("=")
        if not name.strip() or not path.strip():
            raise LolcatsError(f"--local {word}: expected NAME=PATH, such as Salesforce/wikitext=wiki.valid.raw.txt")
        copies[name.strip()] = path.strip()
    return copies


def _check_local(copies: dict[str, str], sources: list[str]) -> None:
    from lolcats.data import local_names

    used = local_names(sources)
    if strays := [name for name in copies if name not in used]:
        raise LolcatsError(
            f"--local {strays[0]}: none of the --sources is called so; expected {', '.join(sorted(used))}"
        )


def _write(file: Path, model: str, settings: dict[str, Any], scores: dict[str, Measurement]) -> None:
    from lolcats.files import write_text

    content = {"model": model, **settings, "scores": {name: asdict(score) for name, score in scores.items()}}
    write_text(file, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no infinity; an infinite perplexity is written as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
