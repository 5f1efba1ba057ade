"""`lolcats benchmark`: tasks of lm-evaluation-harness in one table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lolcats.cli.options import Device, DeviceMapName, Dtype, Model, expand_path, split_words
from lolcats.cli.suite import Controls, JsonFile, Teacher, bar, find_subject, print_memory, progress_file, say_left_out
from lolcats.cli.tables import console, number_table, say
from lolcats.errors import LolcatsError
from lolcats.files import write_json
from lolcats.printable import show_number
from lolcats.variants import ordered, short_label
from lolcats.version import __version__

if TYPE_CHECKING:
    from lolcats.evaluation.harness import HarnessSettings, Row, Score, Scores

Tasks = Annotated[
    list[str],
    typer.Argument(metavar="TASK...", help="Tasks or groups of lm-eval, or YAML files that define one; also a,b."),
]
TaskData = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", callback=expand_path, help="Read TASK_SPLIT.jsonl[.gz] from here, nothing from the hub."
    ),
]
NumFewshot = Annotated[
    list[str] | None,
    typer.Option(metavar="N|TASK=N", help="Examples in the prompt; repeatable. Default: lm-eval's, 5 for mmlu."),
]
Seeds = Annotated[str | None, typer.Option(metavar="N,...", help="Run once with each; default: once, lm-eval's own.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Questions of each task, or part of a group. Default: all.")]
Batch = Annotated[int, typer.Option(min=1, help="Requests at once.")]
Chat = Annotated[bool, typer.Option("--chat", help="Ask in the tokenizer's chat template.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut prompts too long for the model at the left.")]
TaskCode = Annotated[bool, typer.Option("--task-code", help="Run the Python code that the YAML file of a task names.")]


def benchmark(
    model: Model,
    tasks: Tasks,
    task_data: TaskData = None,
    num_fewshot: NumFewshot = None,
    seeds: Seeds = None,
    limit: Limit = None,
    batch_size: Batch = 1,
    chat: Chat = False,
    truncate: Truncate = False,
    task_code: TaskCode = False,
    control: Controls = None,
    teacher: Teacher = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: DeviceMapName = None,
    json_file: JsonFile = None,
) -> None:
    """Benchmarks of lm-eval on a model, its controls and its teacher; goes on where it was interrupted."""
    if not (names := list(dict.fromkeys(split_words(tasks)))):
        raise LolcatsError("no task; expected such as piqa,arc_easy")
    subject = find_subject(model, teacher, control)
    from lolcats.evaluation.harness import HarnessSettings, library_versions, run_benchmarks

    settings = HarnessSettings(
        task_data, _read_examples(num_fewshot), _read_seeds(seeds), limit, batch_size, chat, truncate, task_code
    )
    out = console()
    say_left_out(out, subject)
    place = Path(subject.source).resolve() if Path(subject.source).exists() else subject.source
    file = progress_file(out, json_file, place, names, asdict(settings), subject.teacher, subject.controls)
    with bar(out) as show:
        scores = run_benchmarks(
            subject.source,
            names,
            settings,
            **subject.keywords(device, dtype, device_map),
            progress_file=file,
            show=show,
        )
    if json_file is not None:
        about = {"model": subject.source, "teacher": subject.teacher, "date": date.today().isoformat()}
        about |= {"settings": asdict(settings), "versions": {"lolcats": __version__} | library_versions()}
        memory = None if scores.memory is None else scores.memory.model_dump()
        write_json(json_file, about | asdict(scores) | {"averages": scores.averages(), "memory": memory})
    _print(out, scores, settings)


def _read_seeds(words: str | None) -> list[int]:
    seeds = [_number(word, "--seeds", "0,1,2") for word in words.split(",")] if words else []
    if len(set(seeds)) < len(seeds):
        raise LolcatsError(f"--seeds {words}: expected different seeds; the same one gives the same numbers")
    return seeds


def _read_examples(words: list[str] | None) -> dict[str, int]:
    """Task or group -> examples in its prompts; "*" is any."""
    found: dict[str, int] = {}
    for word in words or []:
        task, _, count = word.rpartition("=")
        found[task.strip() or "*"] = _number(count, "--num-fewshot", "5 or mmlu=5")
    return found


def _number(word: str, option: str, example: str) -> int:
    if not word.strip().isdecimal():
        raise LolcatsError(f"{option}: {word.strip()!r} is no whole number; expected such as {option} {example}")
    return int(word)


def _print(out: Console, scores: Scores, settings: HarnessSettings) -> None:
    names = ordered(scores.rows[0].scores)
    table = number_table(["task", "metric", "shots"], map(short_label, names))
    for row in scores.rows:
        shown = [_show(row, row.scores[name]) for name in names]
        table.add_row(row.task, row.metric.removesuffix(",none"), row.examples, *shown)
    for label, means in scores.averages().items():
        table.add_row(label, "", "", *(show_number(100 * means[name], 1) for name in names))
    out.print(table)
    out.print()
    for note in _notes(scores, settings):
        say(out, note)
    print_memory(out, scores.memory)


def _show(row: Row, score: Score) -> str:
    """The mean and its spread; shares in percent."""
    factor, digits = (100, 1) if row.is_share else (1, 2)
    spread = score.stderr if len(score.values) == 1 else score.sd
    text = show_number(factor * score.mean, digits)
    return text if spread is None else f"{text} ±{show_number(factor * spread, digits)}"


def _notes(scores: Scores, settings: HarnessSettings) -> Iterator[str]:
    count = len(settings.seeds)
    if count > 1:
        yield f"± is the standard deviation over {count} seeds; only tasks that draw examples or sample text have any"
    elif any(score.stderr is not None for row in scores.rows for score in row.scores.values()):
        yield "± is the standard error over the questions"
    if settings.limit is not None:
        yield f"--limit {settings.limit}: " + ", ".join(f"{row.task} {row.questions} questions" for row in scores.rows)
    for task, cut in scores.truncated.items():
        yield f"{task}: {cut:,} prompts were too long for the model and lost their beginning"
