"""`lolcats evaluate`: perplexity of a linearized model, its controls and its teacher on the same text."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lolcats.cli.load import read_results
from lolcats.cli.options import Device, DeviceMapName, Dtype, Model
from lolcats.cli.suite import (
    Controls,
    JsonFile,
    Subject,
    Teacher,
    bar,
    find_subject,
    print_beyond,
    print_memory,
    say_left_out,
)
from lolcats.cli.tables import console, number_table, say, score_table
from lolcats.errors import LolcatsError
from lolcats.files import write_json
from lolcats.printable import show_number
from lolcats.variants import ordered, short_label

if TYPE_CHECKING:
    from lolcats.config import RunConfig
    from lolcats.evaluation import Measurement

MOST_SEGMENTS = 32


def _moved(verb: str, option: str) -> Any:
    """A callback for an option that has become a verb."""

    def refuse(value: Any) -> Any:
        if value:
            raise LolcatsError(f"{option} is a verb of its own: lolcats {verb} MODEL TASK,... (lolcats {verb} --help)")
        return value

    return refuse


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
Batch = Annotated[int | None, typer.Option(min=1, help="Segments at once. Default: the recipe's, else 4.")]
ByPosition = Annotated[bool, typer.Option("--by-position", help="A second table, by place in the text.")]
Beyond = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Perplexity by position on segments N times as long as in training."),
]
Tasks = Annotated[list[str] | None, typer.Option("--tasks", hidden=True, callback=_moved("benchmark", "--tasks"))]
Recall = Annotated[str | None, typer.Option("--recall", hidden=True, callback=_moved("recall", "--recall"))]


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
    device_map: DeviceMapName = None,
    json_file: JsonFile = None,
    by_position: ByPosition = False,
    beyond: Beyond = None,
    tasks: Tasks = None,
    recall: Recall = None,
) -> None:
    """Perplexity and distance from the teacher of a model and its controls."""
    subject = find_subject(model, teacher, control)
    recipe = subject.recipe
    if beyond is not None:
        length, by_position = _beyond(subject.trained, beyond, length), True
    given = {"sources": sources, "length": length, "last": last, "max_segments": max_segments, "local": _local(local)}
    settings = _settings(recipe, given)
    if local:
        _check_local(given["local"], settings["sources"] or (recipe.data.source_names if recipe is not None else []))
    out = console()
    say_left_out(out, subject)
    batch = batch_size or (recipe.evaluation.batch_size if recipe is not None else 4)
    scores = _measure(out, subject, settings, subject.keywords(device, dtype, device_map) | {"batch_size": batch})
    if json_file is not None:
        content = {"model": subject.source, **settings, "teacher": subject.teacher}
        write_json(json_file, content | {"scores": {name: asdict(score) for name, score in scores.items()}})
    _print_scores(out, scores, recipe, settings["sources"], by_default=sources is None)
    print_memory(out, read_results(subject.source).memory)
    if by_position:
        _print_positions(out, scores, settings["length"], subject)


def _measure(out: Console, subject: Subject, settings: dict[str, Any], how: dict[str, Any]) -> dict[str, Measurement]:
    from lolcats.evaluation.compare import compare

    edges = [] if subject.trained is None else [subject.trained]
    held_out = None if settings["sources"] else subject.recipe
    with bar(out, "segments") as show:
        progress = partial(show, "segments")
        return compare(subject.source, **settings, **how, edges=edges, held_out=held_out, progress=progress)


def _beyond(trained: int | None, times: int, length: int | None) -> int:
    if trained is None or length is not None:
        raise LolcatsError(
            "--beyond goes by the training texts of a linearized model and sets the length; give --length alone"
        )
    return times * trained


def _print_positions(out: Console, scores: dict[str, Measurement], length: int, subject: Subject) -> None:
    """Perplexity by the place of a token in its segment: a row a range, a column a variant."""
    names = ordered(scores)
    table = number_table(["tokens"], map(short_label, names))
    for place in scores[names[0]].by_position:
        table.add_row(place, *(show_number(scores[name].by_position.get(place, math.nan)) for name in names))
    out.print("\nperplexity by place in the text")
    out.print(table)
    print_beyond(out, length, subject)
    context = next(iter(scores.values())).context
    if context is not None and length > context:
        out.print(f"from {context:,} tokens on: beyond the context that the pretrained model was made for")


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
    say(out, f"\n{tokens:,} tokens of {names}{note}")


def _settings(recipe: RunConfig | None, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `compare`: what the options leave open comes from the recipe, `last` only with its length.

    Without sources it is the text that the run of the recipe held out. Of its own text a recipe without `max_segments`
    takes all.
    """
    chosen: dict[str, Any] = {"sources": ["python-docs"], "length": 1024, "last": None, "max_segments": MOST_SEGMENTS}
    chosen["local"] = {}
    if recipe is not None:
        e, local = recipe.evaluation, recipe.data.local | given["local"]
        is_other = given["sources"] not in (None, e.sources)
        chosen = {"sources": e.sources, "length": e.segment_length or recipe.data.sequence_length}
        chosen["last"] = e.last if given["length"] is None else None
        chosen |= {"max_segments": e.max_segments or (MOST_SEGMENTS if is_other else None), "local": local}
        given = given | {"local": local}
    return chosen | {name: value for name, value in given.items() if value}


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
