"""`lolcats evaluate MODEL --tasks ...`: benchmarks of lm-evaluation-harness in one table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lolcats.cli.failures import Interrupted
from lolcats.cli.load import silence
from lolcats.cli.options import expand_path
from lolcats.cli.tables import console, show_number
from lolcats.config.variants import ordered, short_label
from lolcats.errors import LolcatsError

if TYPE_CHECKING:
    from lolcats.evaluation.harness import HarnessSettings, Row, Score, Scores

Tasks = Annotated[
    list[str] | None,
    typer.Option("--tasks", metavar="TASK,...", help="Tasks or groups of lm-eval instead of perplexity; repeatable."),
]
TaskData = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        callback=expand_path,
        help="Read TASK_SPLIT.jsonl[.gz] from here, nothing from the hub (--tasks).",
    ),
]
NumFewshot = Annotated[
    list[str] | None,
    typer.Option(metavar="N|TASK=N", help="Examples in the prompt; repeatable. Default: lm-eval's, 5 for mmlu."),
]
Seeds = Annotated[
    str | None, typer.Option(metavar="N,...", help="Run --tasks once with each; default: once, lm-eval's own.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Questions of each task, or part of a group. Default: all.")]
Chat = Annotated[bool, typer.Option("--chat", help="Ask the --tasks in the tokenizer's chat template.")]
Truncate = Annotated[bool, typer.Option("--truncate", help="Cut prompts too long for the model at the left.")]
TaskCode = Annotated[
    bool, typer.Option("--task-code", help="Run the Python code that a YAML file given to --tasks names.")
]


@dataclass
class Wanted:
    """The options that belong to --tasks, as they were typed."""

    tasks: list[str] | None
    task_data: Path | None
    num_fewshot: list[str] | None
    seeds: str | None
    limit: int | None
    chat: bool
    truncate: bool
    task_code: bool = False

    def check(self, others: dict[str, Any]) -> bool:
        """Whether tasks were asked for; `others` are the options of perplexity.

        Raises:
            LolcatsError: options of both.
        """
        mine = {name: value for name, value in vars(self).items() if name != "tasks"}
        given = [name for name, value in (others if self.tasks else mine).items() if value and name != "teacher"]
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            text = "measures perplexity and does not go with --tasks" if self.tasks else "goes with --tasks only"
            raise LolcatsError(f"{flags} {text}; leave it out")
        return bool(self.tasks)

    def names(self) -> list[str]:
        """The tasks, in order.

        Raises:
            LolcatsError: there are none.
        """
        names = [name.strip() for words in self.tasks or [] for name in words.split(",")]
        if not any(names):
            raise LolcatsError("--tasks names no task; expected such as --tasks piqa,arc_easy")
        return list(dict.fromkeys(filter(None, names)))

    def settings(self, batch_size: int) -> HarnessSettings:
        """What the library is given.

        Raises:
            LolcatsError: something cannot be understood.
        """
        from lolcats.evaluation.harness import HarnessSettings

        seeds = [_number(word, "--seeds", "0,1,2") for word in self.seeds.split(",")] if self.seeds else []
        if len(set(seeds)) < len(seeds):
            raise LolcatsError(f"--seeds {self.seeds}: expected different seeds; the same one gives the same numbers")
        examples: dict[str, int] = {}
        for word in self.num_fewshot or []:
            task, _, count = word.rpartition("=")
            examples[task.strip() or "*"] = _number(count, "--num-fewshot", "5 or mmlu=5")
        return HarnessSettings(
            task_data=self.task_data,
            examples=examples,
            seeds=seeds,
            limit=self.limit,
            batch_size=batch_size,
            chat=self.chat,
            truncate=self.truncate,
            code=self.task_code,
        )


def measure(
    source: str,
    wanted: Wanted,
    teacher: str | None,
    controls: list[str],
    batch_size: int,
    device: str,
    dtype: str,
    json_file: Path | None,
) -> None:
    """Run the tasks and print their table; an interruption keeps what was measured."""
    names = wanted.names()
    from lolcats.evaluation.harness import run_benchmarks
    from lolcats.evaluation.harness.progress import default_file

    settings = wanted.settings(batch_size)
    silence()
    out = console()
    place = Path(source).resolve() if Path(source).exists() else source
    command = (place, names, asdict(settings), teacher, controls)
    file = default_file(*command) if json_file is None else json_file.with_name(f"{json_file.name}.progress")
    if file.exists():
        out.print(f"going on with an evaluation that was interrupted ({file})", markup=False, soft_wrap=True)
    try:
        with _bar(out) as show:
            scores = run_benchmarks(
                source,
                names,
                settings,
                teacher=teacher,
                controls=controls,
                device=device,
                dtype=dtype,
                progress_file=file,
                show=show,
            )
    except KeyboardInterrupt as error:
        raise Interrupted("evaluate --tasks") from error
    if json_file is not None:
        _write(json_file, {"model": source, "teacher": teacher}, settings, scores)
    _print(out, scores, settings)


@contextmanager
def _bar(out: Console) -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar of requests under the name of what is measured."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bars:
        bar = bars.add_task("", total=None)
        yield lambda label, done, count: bars.update(bar, description=label, completed=done, total=count)


def _print(out: Console, scores: Scores, settings: HarnessSettings) -> None:
    names = ordered(scores.rows[0].scores)
    table = Table("task", "metric", "shots", box=None, header_style="bold")
    for name in names:
        table.add_column(short_label(name), justify="right")
    for row in scores.rows:
        shown = [_show(row, row.scores[name]) for name in names]
        table.add_row(Text(row.task), Text(row.metric.removesuffix(",none")), row.examples, *shown)
    for label, means in scores.averages().items():
        table.add_row(label, "", "", *(show_number(100 * means[name], 1) for name in names))
    out.print(table)
    out.print()
    for note in _notes(scores, settings):
        out.print(note, markup=False, soft_wrap=True)


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


def _write(file: Path, what: dict[str, Any], settings: HarnessSettings, scores: Scores) -> None:
    from lolcats import __version__
    from lolcats.evaluation.harness import library_versions
    from lolcats.files import write_text

    versions = {"lolcats": __version__} | library_versions()
    content = what | {"date": date.today().isoformat(), "settings": asdict(settings), "versions": versions}
    content |= asdict(scores) | {"averages": scores.averages()}
    write_text(file, json.dumps(_spell(content), indent=2, allow_nan=False) + "\n")


def _spell(value: Any) -> Any:
    """Paths as text; JSON has no infinity, so infinite and missing numbers are null."""
    if isinstance(value, dict):
        return {key: _spell(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spell(item) for item in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return str(value) if isinstance(value, Path) else value


def _number(word: str, option: str, example: str) -> int:
    if not word.strip().isdecimal():
        raise LolcatsError(f"{option}: {word.strip()!r} is no whole number; expected such as {option} {example}")
    return int(word)
