"""What is known of all runs, in one table: results.json, results.csv and results.md in the sweep's folder.

The columns of a finished run are made by functions with a name (`SweepMeasurement`): to add one, put it into
`MEASUREMENTS`, or pass a list of your own to `run_sweep`. What the section `measure` asks for comes after them.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.files import read_json_object, write_text
from lolcats.runs.folder import RunFolder
from lolcats.runs.results import finite
from lolcats.sweep.job import RUN, SEED, TRAINED, Job, Studies, Sweep, SweepRun, is_finished, sweep_teachers
from lolcats.sweep.measure import AGAIN
from lolcats.variants import NAMES

SECTIONS = ("perplexity", "kl", "tokens_per_second", "seconds", "memory")
"""Of columns, in order; those of the section `measure` come after them, and then all others."""
ANEW = "delete it: the table is made anew"
Columns = dict[str, float | None]
"""Name of a column, such as perplexity.student -> value; None where there is no finite number."""


@dataclass(frozen=True)
class SweepMeasurement:
    """Something to know of every run.

    Args:
        name: also of the file in which the columns are kept.
        measure: makes the columns of a finished run.
        kept: whether they are written to RUN/measurements/NAME.json, and read from it the next time.
    """

    name: str
    measure: Callable[[RunConfig, RunFolder], Columns]
    kept: bool = True

    def columns(self, run: SweepRun) -> Columns:
        """Of a finished run; what was kept is not measured again."""
        file = run.folder.path / "measurements" / f"{self.name}.json"
        if self.kept and file.exists():
            kept = read_json_object(file, AGAIN)
            if not all(isinstance(value, float | int | None) for value in kept.values()):
                raise LolcatsError(f"{file} holds something that is not a number; {AGAIN}")
            return kept
        new = finite(self.measure(run.config, run.folder))
        if self.kept:
            file.parent.mkdir(exist_ok=True)
            write_text(file, json.dumps(new, indent=2) + "\n")
        return new


def run_results(config: RunConfig, folder: RunFolder) -> Columns:
    """The columns of results.json: perplexity, KL, tokens/s, seconds, and the memory of a text."""
    results = folder.results()
    found = {section: getattr(results, section) for section in SECTIONS if section != "memory"}
    if results.memory is not None:
        found["memory"] = {"bytes": results.memory.bytes, "kv_tokens": results.memory.kv_tokens}
    columns = {f"{section}.{name}": value for section, part in found.items() for name, value in part.items()}
    columns.pop("kl.teacher", None)
    return columns


MEASUREMENTS: tuple[SweepMeasurement, ...] = (SweepMeasurement("results", run_results, kept=False),)


@dataclass
class Row:
    """One run, or the mean over the seeds of several."""

    name: str
    status: str
    """finished, failed, trained, started or new; of a mean the number of finished seeds, "2/3 seeds"."""
    settings: dict[str, Any]
    """Axis or key -> value."""
    columns: Columns = field(default_factory=dict)
    """Column -> number, or mean of numbers."""
    spread: Columns = field(default_factory=dict)
    """Column -> standard deviation over seeds (n - 1), where there are at least two."""
    error: str = ""
    shared: str = ""
    """Run whose stage 1 was used."""


@dataclass
class Table:
    """All rows of a sweep."""

    name: str
    axes: dict[str, list[Any]]
    runs: list[Row]
    means: list[Row]
    """Means over seeds; empty where `seed` is no axis."""
    teachers: list[Row] = field(default_factory=list)
    """What the section `measure` says of the models before; empty without it."""
    scores: dict[str, bool] = field(default_factory=dict)
    """The columns of the section `measure`, in order -> whether it is a share, which people read in percent."""
    studies: Studies = field(default_factory=dict)
    """See `Sweep`."""

    @property
    def rows(self) -> list[Row]:
        """What a person wants to see of the students: means where there are seeds, else runs."""
        return self.means or self.runs

    @property
    def shown_axes(self) -> list[str]:
        """The axes that tell `rows` apart."""
        return [axis for axis in self.axes if not (self.means and axis == SEED)]

    def columns(self) -> list[str]:
        """All columns with numbers, in order."""
        return self.ordered(name for row in [*self.runs, *self.teachers] for name in row.columns)

    def ordered(self, columns: Iterable[str]) -> list[str]:
        """Columns in the order of the table, each once."""

        def place(column: str) -> tuple[int, int, str]:
            section, _, name = column.partition(".")
            if column in self.scores:
                return len(SECTIONS), list(self.scores).index(column), ""
            first = SECTIONS.index(section) if section in SECTIONS else len(SECTIONS) + 1
            return (first, NAMES.index(name), "") if name in NAMES else (first, len(NAMES), column)

        return sorted(dict.fromkeys(columns), key=place)


def gather(sweep: Sweep, failures: Mapping[str, str], measurements: Sequence[SweepMeasurement] = MEASUREMENTS) -> Table:
    """Read what is known of every run.

    Args:
        failures: name of a run -> its error in one line.
        measurements: what to know of finished runs; those that are missing are made now.
    """
    scores: dict[str, bool] = {}
    runs = [_row(run, failures, measurements, scores) for run in sweep.runs]
    teachers = [_row(job, failures, (), scores) for job in sweep_teachers(sweep, sweep.runs)]
    return Table(sweep.name, sweep.axes, runs, _means(sweep, runs), teachers, scores, sweep.studies)


def read_failures(sweep: Sweep) -> dict[str, str]:
    """The errors that an earlier call of the sweep wrote down, of runs and teachers that are still not finished."""
    file = sweep.folder / "results.json"
    content = read_json_object(file, ANEW)
    left = {job.name for job in sweep.jobs() if not is_finished(job)}
    try:
        rows = [*content.get("runs", []), *content.get("teachers", [])]
        return {row["name"]: str(row["error"]) for row in rows if row["error"] and row["name"] in left}
    except (TypeError, LookupError) as error:
        raise LolcatsError(f"{file} is not the table of a sweep; {ANEW}") from error


def write_table(sweep: Sweep, table: Table) -> None:
    """Replace results.json, results.csv and results.md, and means.csv where there are seeds."""
    rows = {part: [vars(row) for row in getattr(table, part)] for part in ("runs", "means", "teachers")}
    content = {"name": table.name, "axes": table.axes, **rows}
    write_text(sweep.folder / "results.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text(sweep.folder / "results.csv", to_csv(table, [*table.runs, *table.teachers]))
    if table.means:
        write_text(sweep.folder / "means.csv", to_csv(table, [*table.means, *table.teachers]))
    write_text(sweep.folder / "results.md", to_markdown(table))


def to_csv(table: Table, rows: Sequence[Row]) -> str:
    """A line a row; standard deviations are columns of their own."""
    columns, spread = table.columns(), table.ordered(name for row in rows for name in row.spread)
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", "status", *keys, *columns, *(f"{name}.sd" for name in spread), "stage_1_from", "error"])
    for row in rows:
        settings = [show_value(row.settings.get(key)) for key in keys]
        numbers = [row.columns.get(name) for name in columns] + [row.spread.get(name) for name in spread]
        writer.writerow([row.name, row.status, *settings, *numbers, row.shared, row.error])
    return out.getvalue()


def to_markdown(table: Table) -> str:
    """Swept settings and all numbers, rounded; means with their standard deviation, then the single runs."""
    parts = [f"# {table.name}"]
    if table.means:
        means = _markdown_rows(table, table.means, table.shown_axes)
        parts += ["Mean and standard deviation over seeds", means, "Runs"]
    known = {row.name: row for row in table.runs}
    for study, names in table.studies.items():
        rows = [replace(known[there], settings={RUN: name}) for name, there in names.items()]
        parts += [f"## {study}", _markdown_rows(table, rows, [RUN])]
    if not table.studies:
        parts.append(_markdown_rows(table, table.runs, list(table.axes)))
    parts += [f"* {row.name}: {row.error}" for row in [*table.runs, *table.teachers] if row.error]
    return "\n\n".join(parts) + "\n"


def show_number(value: float | None, spread: float | None = None) -> str:
    """A number with the digits that matter, and its standard deviation."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 1000 else 2 if abs(value) >= 1 else 4
    text = f"{value:,.{digits}f}" if abs(value) < 1e7 else f"{value:.2e}"
    return text if spread is None else f"{text} ± {spread:,.{digits}f}"


def show_value(value: Any) -> str:
    """The value of a setting as a person writes it."""
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def axis_cells(row: Row, axes: Sequence[str], nothing: str = "") -> list[str]:
    """The settings of a row as a person reads them; a teacher, which has none, shows its name in the first place."""
    cells = [show_value(row.settings.get(axis)) or nothing for axis in axes]
    return cells if row.settings or not cells else [row.name, *cells[1:]]


def _row(
    job: Job, failures: Mapping[str, str], measurements: Sequence[SweepMeasurement], scores: dict[str, bool]
) -> Row:
    """The row of a job; `scores` is given what is known of the section `measure`."""
    row, run = Row(job.name, "new", job.settings), job if isinstance(job, SweepRun) else None
    try:
        row.shared = run.folder.origin("transfer") if run else ""
        row.status = job.status()
        if row.status in TRAINED or not run:
            found = job.measured.scores(job.measure)
            scores |= {name: score.is_share for name, score in found.items()}
            parts: list[Columns] = [measurement.columns(run) for measurement in measurements] if run else []
            parts.append({name: score.value for name, score in found.items()})
            row.columns = {name: value for part in parts for name, value in part.items()}
    except LolcatsError as error:  # a broken file of one run is no reason to keep the others from the table
        row.status, row.error, row.columns = "failed", " ".join(str(error).split()), {}
    if row.status != "finished" and job.name in failures:
        row.status, row.error = "failed", failures[job.name]
    return row


def _means(sweep: Sweep, rows: Sequence[Row]) -> list[Row]:
    """A row for each point of the axes other than `seed`, if that is one."""
    groups: dict[str, list[Row]] = {}
    for run, row in zip(sweep.runs, rows, strict=True):
        point = [run.settings[axis] for axis in sweep.axes if axis != SEED]
        groups.setdefault(json.dumps(point), []).append(row)
    return [_mean(group) for group in groups.values()] if SEED in sweep.axes else []


def _mean(group: Sequence[Row]) -> Row:
    finished = [row for row in group if row.status == "finished"]
    settings = {key: value for key, value in group[0].settings.items() if key != SEED}
    name = "_".join(part for part in group[0].name.split("_") if not part.startswith(f"{SEED}-"))
    mean = Row(name, f"{len(finished)}/{len(group)} seeds", settings)
    for column in dict.fromkeys(column for row in finished for column in row.columns):
        numbers = [value for row in finished if (value := row.columns.get(column)) is not None]
        whole = len(numbers) == len(finished)  # a mean that leaves out an infinite perplexity would say too little
        mean.columns[column] = statistics.fmean(numbers) if whole else None
        if whole and len(numbers) > 1:
            mean.spread[column] = statistics.stdev(numbers)
    return mean


def _markdown_rows(table: Table, students: Sequence[Row], axes: Sequence[str]) -> str:
    """Rows of students, and then those of the teachers."""
    columns = [name for name in table.columns() if not name.startswith("seconds.") or name == "seconds.total"]
    head = [*axes, "status", *(name.replace(".", " ").replace("_", " ") for name in columns)]
    lines = [head, ["---"] * (len(axes) + 1) + ["---:"] * len(columns)]
    for row in [*students, *table.teachers]:
        numbers = [show_number(row.columns.get(name), row.spread.get(name)) for name in columns]
        lines.append([*axis_cells(row, axes), row.status, *numbers])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
