"""`lolcats bench`: speed and memory of a model and its teacher, beside what the bytes alone would take."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lolcats.cli.load import find_model
from lolcats.cli.options import Device, Dtype, Engine, Graphs, Model, check_target, split_words
from lolcats.cli.suite import JsonFile, Teacher, bar, find_subject
from lolcats.cli.tables import console, number_table, say
from lolcats.errors import LolcatsError
from lolcats.files import write_json, write_text
from lolcats.printable import show_bytes
from lolcats.version import __version__

if TYPE_CHECKING:
    from lolcats.evaluation.speed import Row

FULL = "out of memory"
Recipe = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Convert a model that is not linearized by this recipe or YAML file, untrained."),
]
Batches = Annotated[
    str | None, typer.Option("--batch", metavar="N,...", help="Texts at once. Default: 1,8,64 on a GPU, else 1,4.")
]
Contexts = Annotated[
    str | None,
    typer.Option("--context", metavar="N,...", help="Tokens of each prompt. Default: 1024,4096,16384 as far as the "
                 "model's context goes."),
]  # fmt: skip
Tokens = Annotated[int, typer.Option(min=1, max=10**6, help="Tokens decoded for one measurement.")]
Repeat = Annotated[int, typer.Option(min=1, max=1000, help="Measurements; the median counts.")]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="Read config.json alone.")]
Beyond = Annotated[bool, typer.Option("--beyond-context", help="Allow contexts beyond the model's.")]
CsvFile = Annotated[
    Path | None, typer.Option("--csv", metavar="FILE", callback=check_target, help="Write a line a row, at each row.")
]
Options = Annotated[
    str | None, typer.Option("--vllm-options", metavar="JSON", help='For vllm.LLM: {"gpu_memory_utilization": 0.8}.')
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", callback=check_target, help="Draw the rows (.png, .pdf or .svg).")
]


def bench(
    model: Model,
    recipe: Recipe = None,
    batches: Batches = None,
    contexts: Contexts = None,
    tokens: Tokens = 32,
    repeat: Repeat = 3,
    random_weights: RandomWeights = False,
    beyond_context: Beyond = False,
    graphs: Graphs = True,
    teacher: Teacher = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    csv_file: CsvFile = None,
    plot: Plot = None,
    json_file: JsonFile = None,
    engine: Engine = "transformers",
    vllm_options: Options = None,
) -> None:
    """Prefill, decoding and memory against batch and context, for a model and its teacher.

    Beside each decoding step stands its limit, the bytes that it must move at the bandwidth of a copy; beside the
    memory of a text what was computed. llama-3-8b-shape is a Llama of the sizes of Llama 3 8B with random weights.
    """
    source, teacher = _find(model, teacher, recipe)
    from lolcats.evaluation.recall.plot import check_figure
    from lolcats.evaluation.speed import SpeedSettings, Subjects, copy_bandwidth
    from lolcats.models.device import choose_device

    if plot is not None:
        check_figure(plot)
    measure = _measuring(engine, vllm_options)
    place = choose_device(device)
    sizes = _read_numbers("--batch", batches or ("1,4" if place.type == "cpu" else "1,8,64"))
    prompts = None if contexts is None else _read_numbers("--context", contexts)
    settings = SpeedSettings(sizes, prompts, tokens, repeat, beyond_context, graphs)
    subjects = Subjects(source, teacher, recipe, random_weights, place, dtype)
    out, rows = console(), list["Row"]()
    about = {"model": source, "teacher": teacher, "recipe": recipe, "random_weights": random_weights}
    try:
        with bar(out, "loading the model") as report:
            about |= _about(place, bandwidth := copy_bandwidth(place))
            for row in measure(subjects, settings, bandwidth, report):
                rows.append(row)
                _save(rows, about, csv_file, json_file)
    finally:  # after Ctrl-C too
        if rows:
            _show(out, rows, about)
            _draw(out, rows, plot)


def _measuring(engine: str, options: str | None) -> Callable[..., Iterator[Row]]:
    """What measures subjects by settings at a bandwidth, and reports how far it is."""
    from lolcats.evaluation import speed

    if engine == "transformers":
        if options is not None:
            raise LolcatsError("--vllm-options are for --engine vllm; leave them out")
        return lambda subjects, *given: speed.measure_speed(subjects.each(), *given)
    from lolcats.serving.vllm_bench import check_vllm, measure_engine

    check_vllm()
    return partial(measure_engine, options=_read_options(options))


def _read_options(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise LolcatsError(f"--vllm-options is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise LolcatsError(f'--vllm-options must be an object such as {{"gpu_memory_utilization": 0.8}}; got {text}')
    return found


def _find(model: str, teacher: str | None, recipe: str | None) -> tuple[str, str | None]:
    """Model and teacher; with a recipe the model is the teacher, unless there is to be none."""
    if recipe is not None:
        if teacher not in (None, "none"):
            raise LolcatsError(
                f"--teacher {teacher}: with --recipe the model is its own teacher; leave it out, or none"
            )
        return find_model(model), None if teacher == "none" else model
    subject = find_subject(model, teacher, [])
    return subject.source, subject.teacher


def _read_numbers(option: str, text: str) -> list[int]:
    words = split_words([text])
    if not words or not all(word.isdecimal() and len(word) < 10 and int(word) > 0 for word in words):
        raise LolcatsError(f"{option} must be numbers from 1 on, such as 1,8,64; got {text!r}")
    return sorted({int(word) for word in words})


def _about(device: Any, bandwidth: float) -> dict[str, object]:
    """What absolute numbers depend on."""
    import torch
    import transformers

    from lolcats.models.device import describe_device
    from lolcats.serving.vllm_plugin import installed_version

    versions = {"lolcats": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"vllm": installed_version() or ""}
    where = {"device": describe_device(device), "copy_bytes_per_second": round(bandwidth)}
    return {**where, "date": date.today().isoformat(), **versions}


def _save(rows: list[Row], about: dict[str, object], csv_file: Path | None, json_file: Path | None) -> None:
    """Write all rows so far: what is measured is kept, whatever comes."""
    from lolcats.evaluation.speed import to_csv

    if csv_file is not None:
        write_text(csv_file, to_csv(rows, about))
    if json_file is not None:
        write_json(json_file, about | {"rows": [row.numbers() for row in rows]})


def _show(out: Console, rows: list[Row], about: dict[str, object]) -> None:
    names = ["lolcats", "torch", "transformers", *(["vllm"] if rows[0].engine == "vllm" else [])]
    versions = ", ".join(f"{name} {about[name]}" for name in names)
    say(out, f"{about['model']} on {about['device']}, {rows[0].dtype}, {about['date']}; {versions}\n")
    out.print(speed_table(rows))
    out.print()
    out.print(memory_table(rows))
    out.print()
    for note in _notes(rows, about):
        say(out, note)


def speed_table(rows: list[Row]) -> Table:
    """A row a model, batch and context; those that compare stand together."""
    names = ["first token, ms", "prefill tokens/s", "step, ms", "limit, ms", "ratio", "decode tokens/s"]
    table = number_table(["", "steps"], ["batch", "context", *names])
    for row in _in_order(rows):
        first, step = row.times.first_token, row.times.step
        cells = (
            FULL if first is None else _figures(1e3 * first),
            _figures(row.prefill_speed),
            FULL if step is None else _figures(1e3 * step),
            _figures(1e3 * row.limit),
            _figures(row.ratio),
            _figures(row.decode_speed),
        )
        table.add_row(row.variant, row.times.steps or "-", f"{row.batch:,}", f"{row.context:,}", *cells)
    return table


def memory_table(rows: list[Row]) -> Table:
    """What one text takes, measured and computed."""
    names = ["batch", "context", "memory a text", "computed"]
    peaks, fits = any(row.times.reading_memory is not None for row in rows), any(row.fit is not None for row in rows)
    table = number_table([""], [*names, *(["peak of prefill"] if peaks else []), *(["fit at once"] if fits else [])])
    for row in _in_order(rows):
        measured, reading = row.times.memory, row.times.reading_memory
        cells = [FULL if measured is None else show_bytes(measured), show_bytes(row.text_bytes)]
        if peaks:
            cells.append(FULL if reading is None else show_bytes(reading))
        if fits:
            cells.append("-" if row.fit is None else f"{row.fit:,}")
        table.add_row(row.variant, f"{row.batch:,}", f"{row.context:,}", *cells)
    return table


def _in_order(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.batch, row.context, row.variant))


def _figures(value: float | None) -> str:
    """Three figures, all of those before the point."""
    if value is None:
        return "-"
    return f"{value:,.{min(5, max(0, 2 - math.floor(math.log10(value))))}f}"


def _notes(rows: list[Row], about: dict[str, Any]) -> Iterator[str]:
    named = ", ".join(f"{variant} {name}" for variant, name in dict.fromkeys((r.variant, r.attention) for r in rows))
    yield f"attention: {named}; random tokens, {rows[0].tokens} decoded for each measurement; medians"
    if about["recipe"] is not None:
        yield f"the student's layers are those of {about['recipe']}, untrained: speed does not depend on training"
    elif not any(row.variant == "student" for row in rows):
        yield "the model is not linearized; --recipe recommended would measure it with linearized layers too"
    if about["random_weights"]:
        yield "the weights are random: config.json alone was read"
    speed = float(about["copy_bytes_per_second"]) / 1e9
    yield (
        "limit: the bytes of a step, which are the weights and each text's state or keys and values, at the "
        f"{speed:,.1f} GB/s of a copy here (read and written); ratio: how many times that it takes"
    )
    if rows[0].engine == "vllm":
        if about["recipe"] is not None:
            yield "vLLM was given configurations alone: its weights are small random numbers"
        yield "memory a text: vLLM's pages that it holds, counted in its pool; computed: its state, or keys and values"
        yield "fit at once: texts of this length that vLLM's pages have room for, in the memory that it took for them"
        return
    counted = any(row.times.reading_memory is not None for row in rows)
    what = "the peak while decoding, weights not counted" if counted else "what its cache holds"
    yield f"memory a text: {what}; computed: its state, or keys and values"


def _draw(out: Console, rows: list[Row], plot: Path | None) -> None:
    if plot is not None:
        from lolcats.evaluation.speed.plot import plot_speed

        plot_speed(rows, plot)
        say(out, f"plot: {plot}")
