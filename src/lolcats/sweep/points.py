"""Perplexity and recall of many students, each at the memory of its state: what runs, sweeps and files say.

The table is also a CSV file, which is read again as another source: `line`, `kv_tokens`, `perplexity`, then a column of
recall for each TASK.LENGTH, as shares; `kv_tokens` of the teacher is empty.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lolcats.config import LinearizationConfig, RunConfig, load_config
from lolcats.config.mixers import BlendConfig
from lolcats.errors import LolcatsError
from lolcats.files import read_json_object
from lolcats.runs.artefact import RECIPE_FILE, RESULTS_FILE
from lolcats.runs.folder import RunFolder
from lolcats.runs.results import Results, read_results
from lolcats.variants import TRAINED_WINDOW

TEACHER = "teacher"
WINDOWS = {"equal_window": "nothing trained", TRAINED_WINDOW: "trained"}
"""Controls that have the memory of the student, and its bits: plain windows, and how far these were trained."""
SAME_TEXT = 1.01
"""Ratio of two perplexities of the teacher above which they are not of the same text."""
FIRST_COLUMNS = ["line", "kv_tokens", "perplexity"]
CELL = re.compile(r".+\.[0-9]+")
THEN = "delete it or leave it out"


@dataclass
class Point:
    """One model, or one of its controls."""

    line: str
    """What kind of layer it has: points of a line are joined."""
    kv_tokens: float | None
    """Memory of a text; None is the teacher's, which grows."""
    perplexity: float | None = None
    recall: dict[str, float] = field(default_factory=dict)
    """TASK.LENGTH -> share of answers that were right."""
    source: str = ""
    variant: str = ""
    """Which of the variants of its source it is, where that is known."""


def read_points(sources: Sequence[str | Path]) -> list[Point]:
    """The points of all sources, teachers among them.

    Args:
        sources: folders of runs, models and sweeps; CSV files as `to_csv` writes them; and JSON files of recall, which
            add to the models that they name, wherever in the list they stand.

    Raises:
        LolcatsError: a source has no points, or not all were measured on the same text.
    """
    points: list[Point] = []
    extra: list[Path] = []
    for source in map(Path, sources):
        if source.suffix == ".json":
            extra.append(source)
        else:
            found = list(_from_csv(source) if source.suffix == ".csv" else _from_folder(source))
            if not any(point.kv_tokens is not None for point in found):
                raise LolcatsError(f"{source}: nothing to plot, no student with its memory was measured there yet")
            points += found
    for file in extra:
        _add_recall(points, file)
    if not points:
        raise LolcatsError("nothing to plot; name folders of runs or sweeps beside files of recall")
    _check_text(points)
    return points


def to_csv(points: Sequence[Point]) -> str:
    """A line a point."""
    cells = list(dict.fromkeys(cell for point in points for cell in point.recall))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*FIRST_COLUMNS, *cells])
    for point in points:
        writer.writerow([point.line, point.kv_tokens, point.perplexity, *(point.recall.get(cell) for cell in cells)])
    return out.getvalue()


def line_of(layer: LinearizationConfig, fine_tuned: bool) -> str:
    """What kind of layer a student has, without its sizes."""
    if not isinstance(layer, BlendConfig):
        words = [layer.mixer]
    elif layer.most_pairs == 0 and layer.far == "none":
        words = ["window"]
    else:
        pairs = "kept pairs" if layer.most_pairs else "no pairs"
        words = [layer.mixer, pairs, "no far half" if layer.far == "none" else f"far {layer.far.replace('_', ' ')}"]
    words += _bits(layer)
    words += [f"shared by {layer.budget}"] if isinstance(layer, BlendConfig) and layer.budget != "uniform" else []
    words += ["some layers softmax"] if layer.layers != "all" else []
    trained = ["trained" if words[0] == "window" else ""] if fine_tuned else ["no stage 2"]
    return ", ".join(word for word in words + trained if word)


def _bits(layer: LinearizationConfig) -> list[str]:
    return [f"{layer.bits} bits"] if isinstance(layer, BlendConfig) and layer.bits != 16 else []


def _from_folder(folder: Path) -> Iterator[Point]:
    """The points of a run, a model, or all finished runs of a sweep."""
    if (folder / RECIPE_FILE).is_file():
        yield from _of_run(folder, load_config(folder / RECIPE_FILE), read_results(folder / RESULTS_FILE, THEN), {})
    elif (folder / "config.yaml").is_file():
        run = RunFolder(folder)
        yield from _of_run(folder, run.config(), run.results(), _measured(folder / "measurements" / "measure.json"))
    elif folder.is_dir():
        runs = [inner for inner in sorted(folder.iterdir()) if (inner / "config.yaml").is_file()]
        if not runs:
            raise LolcatsError(f"{folder}: nothing to plot; expected the folder of a run, a model or a sweep")
        for inner in runs:
            if "student" in RunFolder(inner).results().perplexity:
                yield from _from_folder(inner)
        for file in sorted((folder / "measurements").glob("teacher*.json")):
            yield Point(TEACHER, None, None, _measured(file), str(folder))
    else:
        raise LolcatsError(f"{folder} is not there; expected the folder of a run, a model or a sweep, or a .csv file")


def _of_run(folder: Path, config: RunConfig, results: Results, recall: dict[str, float]) -> Iterator[Point]:
    if results.memory is None:
        raise LolcatsError(f"{folder} does not say its memory, as runs of version 0.1; nothing to plot it against")
    found, tokens = results.perplexity, results.memory.kv_tokens
    if "student" in found:
        line = line_of(config.linearization, config.finetune.enabled)
        yield Point(line, tokens, found["student"], recall, str(folder), "student")
    for name in (name for name in WINDOWS if name in found):
        line = ", ".join(["window", *_bits(config.linearization), WINDOWS[name]])
        yield Point(line, tokens, found[name], {}, str(folder), name)
    if TEACHER in found:
        yield Point(TEACHER, None, found[TEACHER], {}, str(folder), TEACHER)


def _measured(file: Path) -> dict[str, float]:
    """The cells of recall in the file of a sweep's measurements."""
    try:
        cells = read_json_object(file, THEN).get("recall", {})
        return {name: float(record["cell"]["score"]) for name, record in cells.items()}
    except (TypeError, LookupError, ValueError, AttributeError) as error:
        raise LolcatsError(f"{file} is not what a sweep has measured; {THEN}") from error


def _add_recall(points: list[Point], file: Path) -> None:
    """Give the points of a model what a file of `lolcats recall` says of it and its controls."""
    if not file.is_file():
        raise LolcatsError(f"{file} is not there; expected the JSON file that lolcats recall writes")
    content = read_json_object(file, THEN)
    try:
        model, cells = Path(str(content["model"])), content["cells"]
        scores = {(c["variant"], f"{c['task']}.{c['length']}"): float(c["score"]) for c in cells}
    except (TypeError, LookupError, ValueError) as error:
        raise LolcatsError(
            f"{file}: expected the JSON file that lolcats recall writes, with model and cells"
        ) from error
    own = [point for point in points if point.source and _same(Path(point.source), model)]
    if not own:
        raise LolcatsError(f"{file} is about {model}, which is not among the sources; name its run too")
    for (variant, cell), score in scores.items():
        for point in own:
            if point.variant == variant:
                point.recall[cell] = score


def _same(source: Path, model: Path) -> bool:
    return model.resolve() in (source.resolve(), (source / "model").resolve())


def _from_csv(file: Path) -> Iterator[Point]:
    try:
        rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))))
        for row in rows:
            yield _from_row(row, file)
    except (OSError, UnicodeDecodeError, ValueError, LookupError, csv.Error) as error:
        raise LolcatsError(
            f"{file} cannot be read ({error}); expected the columns {', '.join(FIRST_COLUMNS)}, then TASK.LENGTH"
        ) from error


def _from_row(row: dict[str, Any], file: Path) -> Point:
    numbers = {name: float(value) for name, value in row.items() if name != "line" and value}
    if bad := next((name for name in numbers if name not in FIRST_COLUMNS and not CELL.fullmatch(name)), None):
        raise ValueError(f"the column {bad!r} is not TASK.LENGTH")
    tokens, perplexity = (numbers.pop(name, None) for name in FIRST_COLUMNS[1:])
    if (tokens is None) != (row["line"] == TEACHER) or (tokens or 1) <= 0:
        raise ValueError(f"{row['line']} has {tokens} KV tokens")
    return Point(row["line"], tokens, perplexity, numbers, str(file))


def _check_text(points: Sequence[Point]) -> None:
    """Refuse perplexities of different texts, of which the teacher's tell."""
    known = [point for point in points if point.line == TEACHER and point.perplexity]
    if known:
        low, high = (choose(known, key=lambda point: point.perplexity or 0.0) for choose in (min, max))
        if (high.perplexity or 0) > SAME_TEXT * (low.perplexity or 0):
            raise LolcatsError(
                f"not measured on the same text, or not of the same teacher: its perplexity is {low.perplexity:.2f} in "
                f"{low.source} and {high.perplexity:.2f} in {high.source}; plot them apart"
            )
