"""From folders to subjects: everything that is written about a run or model, read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lolcats.config import load_config
from lolcats.errors import LolcatsError
from lolcats.evaluation.analysis import read_analysis
from lolcats.evaluation.analysis.file import FILE
from lolcats.report.measured import AnyFile, BenchmarkFile, EvaluateFile, RecallFile, read_measured
from lolcats.report.sizes import read_sizes
from lolcats.report.subject import Subject
from lolcats.runs.artefact import RECIPE_FILE, RESULTS_FILE
from lolcats.runs.folder import STAGES, RunFolder
from lolcats.runs.metrics import read_lines
from lolcats.runs.results import read_results

THEN = "delete it to go on without the numbers"
OWN_FILES = ("results.json", FILE)
"""Of a run, which are read by name."""
OF_MODELS = ("config", "generation_config", "tokenizer", "special_tokens", "added_tokens", "vocab", "model.")
"""How the names of files begin that models are made of."""


def gather(sources: Sequence[Path], files: Sequence[Path] = ()) -> list[Subject]:
    """All that is known of runs and models.

    Args:
        sources: folders of runs, finished or not, and of linearized models.
        files: of `lolcats evaluate`, `benchmark` and `recall`, about any of the sources, beside those that lie in their
            folders.

    Raises:
        LolcatsError: a source is neither, a file cannot be read or is about none of them.
    """
    if len({source.resolve() for source in sources}) < len(sources):
        raise LolcatsError("a run is named twice; name each once")
    subjects = [_read(source) for source in sources]
    _name_apart(subjects)
    for file in files:
        if not file.is_file():
            raise LolcatsError(f"{file} is not there; expected a file that lolcats evaluate, benchmark or recall wrote")
        if not (found := read_measured(file)):
            raise LolcatsError(f"{file} holds no numbers; expected what lolcats evaluate, benchmark or recall wrote")
        for measured in found:
            _give(measured, subjects)
    return subjects


def _read(source: Path) -> Subject:
    if (source / RECIPE_FILE).is_file():
        subject = _read_model(source)
    elif (source / "config.yaml").is_file():
        subject = _read_run(source)
    elif source.is_dir():
        raise LolcatsError(f"{source} is no run and no linearized model: it has no config.yaml and no {RECIPE_FILE}")
    else:
        raise LolcatsError(f"{source} is not there; expected the folder of a run or of a linearized model")
    for file in _files_in(source):
        _take(file, subject)
    if subject.model is not None:
        try:
            subject.sizes = read_sizes(subject.model, subject.config)
        except LolcatsError as error:
            subject.notes.append(f"sizes of the model: {error}")
    return subject


def _take(file: Path, subject: Subject) -> None:
    """Read a file that lies in the folder of a subject; what is wrong with it is a note, for anything may lie there."""
    try:
        found = read_measured(file)
    except LolcatsError as error:
        subject.notes.append(str(error))
        return
    for measured in found:
        if measured.model is None or is_about(measured.model, subject.place):
            _list_of(measured, subject).append(measured)
        else:
            subject.notes.append(f"{file.name} is about {measured.model} and was left out")


def _read_model(folder: Path) -> Subject:
    config, results = load_config(folder / RECIPE_FILE), read_results(folder / RESULTS_FILE, THEN)
    subject = Subject(config.name, folder, config, results)
    subject.model = folder if (folder / "config.json").is_file() else None
    subject.analysis = read_analysis(folder)
    return subject


def _read_run(folder: Path) -> Subject:
    run = RunFolder(folder)
    subject = Subject(folder.resolve().name, folder, run.config(), run.results())
    subject.model = run.model if (run.model / "config.json").is_file() else None
    subject.metrics = read_lines(run.metrics_file)
    subject.lora = read_lines(folder / "lora.jsonl")
    subject.unfinished = "" if subject.results.complete else _what_is_left(run)
    subject.analysis = read_analysis(folder)
    return subject


def _what_is_left(run: RunFolder) -> str:
    """How far a run is that has not measured all."""
    words = {"new": "not begun", "begun": "begun", "finished": "done"}
    names = {"transfer": "stage 1", "finetune": "stage 2"}
    try:
        stages = [f"{names[stage]} {words[run.stage_state(stage)]}" for stage in STAGES]
    except LolcatsError as error:
        return f"not finished: {error}"
    model = "its model is saved" if run.has_model() else "no model yet"
    return f"not finished: {', '.join(stages)}, {model}"


def _files_in(folder: Path) -> Iterator[Path]:
    names = {*OWN_FILES, RESULTS_FILE}
    yield from (f for f in sorted(folder.glob("*.json")) if f.name not in names and not f.name.startswith(OF_MODELS))
    yield from sorted((folder / "measurements").glob("measure.json"))


def is_about(model: str, source: Path) -> bool:
    """Whether a file that names a model means that of a folder; of one that is not here, the names are compared."""
    named = Path(model)
    if named.exists():
        return named.resolve() in (source.resolve(), (source / "model").resolve())
    own, parts = source.resolve().name, named.parts
    return parts[-1:] == (own,) or parts[-2:] == (own, "model")


def _list_of(measured: AnyFile, subject: Subject) -> list[Any]:
    """The files of its kind."""
    kinds = {EvaluateFile: subject.evaluations, BenchmarkFile: subject.benchmarks, RecallFile: subject.recalls}
    return kinds[type(measured)]


def _give(measured: AnyFile, subjects: Sequence[Subject]) -> None:
    """Put what a file says to the subject that it is about, before what lies in its folder."""
    model = measured.model
    own = [subject for subject in subjects if model is not None and is_about(model, subject.place)]
    if not own:
        raise LolcatsError(
            f"{measured.file} is about {model or 'a model that it does not name'}, which is not among the runs and "
            "models of this report; name it too"
        )
    for subject in own:
        known = _list_of(measured, subject)
        known[:] = [measured, *(other for other in known if other.file.resolve() != measured.file.resolve())]


def _name_apart(subjects: Sequence[Subject]) -> None:
    """Give subjects that are called alike their folders as names."""
    names = [subject.name for subject in subjects]
    for subject in subjects:
        if names.count(subject.name) > 1:
            subject.name = str(subject.place)
