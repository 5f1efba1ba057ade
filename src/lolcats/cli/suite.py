"""What `evaluate`, `benchmark` and `recall` share: the model with its variants, and how numbers are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lolcats.cli.load import find_model, read_recipe
from lolcats.cli.options import check_target, device_map_of
from lolcats.cli.tables import say
from lolcats.errors import LolcatsError
from lolcats.variants import CONTROLS, TRAINED_WINDOW

if TYPE_CHECKING:
    from lolcats.config import RunConfig
    from lolcats.evaluation.memory import TextMemory

Controls = Annotated[
    list[str] | None, typer.Option(help=f"{', '.join(CONTROLS)}, or none; repeatable. Default: all of them.")
]
Teacher = Annotated[
    str | None, typer.Option(metavar="SOURCE", help="Default: the one of the recipe; none leaves it out.")
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", callback=check_target, help="Also write the numbers to this file."),
]


@dataclass
class Subject:
    """What is measured."""

    source: str
    recipe: RunConfig | None
    teacher: str | None
    controls: list[str]

    @property
    def trained(self) -> int | None:
        """Tokens of the texts of its linearization."""
        return None if self.recipe is None else self.recipe.data.sequence_length

    def keywords(self, device: str, dtype: str, device_map: str | None = None) -> dict[str, Any]:
        """The arguments of `load_variants` beside the model; raises as `device_map_of` does."""
        where = {"device": device, "dtype": dtype, "device_map": device_map_of(device_map, device)}
        return {"teacher": self.teacher, "controls": self.controls, **where}


def find_subject(model: str, teacher: str | None, control: list[str] | None) -> Subject:
    """The model that a verb was given, with the teacher of its recipe.

    Raises:
        LolcatsError: a run without a model, or an unknown control.
    """
    chosen = list(CONTROLS) if control is None else [name for name in control if name != "none"]
    if unknown := [name for name in chosen if name not in CONTROLS]:
        raise LolcatsError(f"unknown control {', '.join(unknown)}; expected {', '.join(CONTROLS)}, or none")
    source = find_model(model)
    recipe = read_recipe(source)
    teacher = teacher or (None if recipe is None else recipe.model)
    return Subject(source, recipe, None if teacher == "none" else teacher, chosen)


def say_left_out(out: Console, subject: Subject) -> None:
    """Say why there will be no numbers of the trained window, where it is asked for."""
    from lolcats.evaluation.trained_window import has_window, why_left_out

    asked = TRAINED_WINDOW in subject.controls and subject.recipe is not None and subject.teacher is not None
    if asked and not has_window(subject.source):
        say(out, why_left_out(subject.source))


def progress_file(out: Console, json_file: Path | None, *command: object) -> Path:
    """Where answers are kept until all are there: beside the file of numbers, else in the cache, a file a command."""
    from lolcats.evaluation.store import default_file

    file = default_file(*command) if json_file is None else json_file.with_name(f"{json_file.name}.progress")
    if file.exists():
        say(out, f"going on with an evaluation that was interrupted ({file})")
    return file


@contextmanager
def bar(out: Console, label: str = "") -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar under the name of what is measured; what it yields takes (name, done, all or None if not known)."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bars:
        shown = bars.add_task(label, total=None)
        yield lambda name, done, count: bars.update(shown, description=name, completed=done, total=count)


def print_memory(out: Console, memory: TextMemory | None) -> None:
    """The line under a table of numbers that says what they cost."""
    if memory is not None:
        say(out, f"\n{memory.line()}")


def print_beyond(out: Console, length: int, subject: Subject) -> None:
    """Say which lengths are beyond the texts of the training."""
    if subject.trained is not None and length > subject.trained:
        out.print(f"from {subject.trained:,} tokens on: beyond the texts of the linearization")
