"""The parts of a sweep that can be done by themselves: a run with its measurements, and a teacher's measurements."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.evaluation import Variant
from lolcats.evaluation.compare import load_variants
from lolcats.evaluation.harness.run import load_benchmarks, measure_benchmarks, require_lm_eval
from lolcats.evaluation.recall import RecallSettings, recall
from lolcats.evaluation.store import AnswerStore
from lolcats.models.context import check_context
from lolcats.models.empty import known_model
from lolcats.runs.recipe import linearize
from lolcats.silence import quiet
from lolcats.sweep.measure import MeasureConfig
from lolcats.sweep.measured import Measured
from lolcats.sweep.naming import label
from lolcats.sweep.settings import Sweep, SweepRun
from lolcats.sweep.state import run_status
from lolcats.variants import VARIANTS

Say = Callable[[str], None]


@dataclass(frozen=True)
class SweepTeacher:
    """A teacher that is measured once, for all runs that have it."""

    name: str
    config: RunConfig
    """Of one of its runs."""
    measure: MeasureConfig
    file: Path

    @property
    def is_finished(self) -> bool:
        """Whether nothing is missing."""
        return Measured(self.file).is_complete(self.measure)


Job = SweepRun | SweepTeacher


def sweep_teachers(sweep: Sweep, runs: Sequence[SweepRun] | None = None) -> list[SweepTeacher]:
    """The teachers to be measured, one for each model and number format; "teacher" where there is one alone.

    Args:
        runs: only those of these runs.
    """
    if not (sweep.measure.teacher and sweep.measure.anything):
        return []
    configs = {(run.config.model, run.config.dtype): run.config for run in reversed(sweep.runs)}
    wanted = {(run.config.model, run.config.dtype) for run in (sweep.runs if runs is None else runs)}
    teachers = []
    measure = sweep.measure.model_copy(update={"controls": []})
    for (model, dtype), config in reversed(configs.items()):
        digest = hashlib.sha256(f"{model} {dtype}".encode()).hexdigest()[:8]
        name = f"teacher-{label(Path(model).name)}-{dtype}-{digest}"
        file = sweep.folder / "measurements" / f"{name}.json"
        if (model, dtype) in wanted:
            teachers.append(SweepTeacher(name if len(configs) > 1 else "teacher", config, measure, file))
    return teachers


def find_job(sweep: Sweep, name: str) -> Job:
    """The run or teacher of a name.

    Raises:
        LolcatsError: there is none.
    """
    for job in [*sweep.runs, *sweep_teachers(sweep)]:
        if job.name == name:
            return job
    raise LolcatsError(f"{name}: neither a run nor a teacher of {sweep.name}; its runs are in {sweep.folder}")


def do_job(job: Job, console: Console | None) -> None:
    """Do what is left of a run (linearize, then measure its student) or of a teacher (measure it).

    Raises:
        LolcatsError: see `linearize` and `measure_model`.
    """

    def say(text: str) -> None:
        if console is not None:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    config = job.config
    try:
        if isinstance(job, SweepTeacher):
            where = {"device": config.device, "dtype": config.dtype}
            measure_model(config.model, Measured(job.file), job.measure, **where, say=say)
        else:
            folder = linearize(config, resume=True, console=console)
            _release_memory()
            where = {"teacher": config.model, "device": config.device}
            measure_model(str(folder.model), Measured.of_run(folder), job.measure, **where, say=say)
    finally:
        _release_memory()


def check_measure(sweep: Sweep, *, fetch: bool = True) -> None:
    """See that everything can be measured before anything is trained.

    Args:
        fetch: also get what is on the hub; else tasks are looked up by name, where lm-eval is installed.

    Raises:
        LolcatsError: lm-eval is missing, a task or its data cannot be had, or a length is beyond a model's context.
    """
    measure = sweep.measure
    if measure.tasks and (fetch or importlib.util.find_spec("lm_eval")):
        require_lm_eval()
        from lolcats.evaluation.harness.catalog import catalog

        with quiet():
            if fetch or measure.task_data is not None:
                load_benchmarks(measure.tasks, measure.harness_settings())
            else:
                catalog().check(measure.tasks)
    for source in dict.fromkeys(run.config.model for run in sweep.runs) if measure.recall else ():
        if (model := known_model(source)) is not None:
            check_context(model, max(measure.lengths), "measure.lengths: a prompt", beyond=False)


def measure_model(
    source: str,
    measured: Measured,
    measure: MeasureConfig,
    *,
    teacher: str | None = None,
    device: str,
    dtype: str = "auto",
    say: Say,
) -> None:
    """Measure what is missing of a student or a teacher, and keep it; an interruption loses one batch at most.

    Args:
        source: the linearized model, or a pretrained one.
        measured: where the numbers go; answers to an unfinished task are kept beside it.
        teacher: of a linearized model, for the controls that have its weights.
        device, dtype: as in `RunConfig`; the "auto" dtype of a linearized model is its own.
        say: where progress is shown.

    Raises:
        LolcatsError: a task or its data cannot be had, or does not fit the model.
    """
    if measured.is_complete(measure):
        return
    needed = any(row.weights == "teacher" for row in VARIANTS if row.name in measure.controls)
    said: set[str] = set()

    def show(label: str, done: int, count: int | None) -> None:
        if label not in said:
            said.add(label)
            say(f"measuring: {label}")

    with _full_precision(), AnswerStore(measured.file.with_name(f"{measured.file.name}.progress")) as store:
        before = teacher if needed else None
        loaded = load_variants(source, teacher=before, controls=measure.controls, device=device, dtype=dtype)
        name = "student" if "student" in loaded.variants else "teacher"
        if measured.missing_tasks(measure):
            modes = {key: mode for key, mode in loaded.variants.items() if key == name or key != "teacher"}
            _measure_tasks(modes, loaded.tokenizer, measured, measure, store, show)
        missing = measured.missing_cells(measure)
        for task in dict.fromkeys(task for task, _ in missing):
            asked = RecallSettings([task], [n for other, n in missing if other == task], measure.samples)
            how = {"batch_size": measure.batch_size, "store": store, "report": show}
            for cell in recall({name: loaded.variants[name]}, loaded.tokenizer, asked, **how):
                measured.add_cell(measure, cell)
    for column, score in measured.columns(measure).items():
        say(f"{name:<14} {column} " + ("-" if score.value is None else f"{score.value:.4f}"))


def _measure_tasks(
    modes: dict[str, Variant],
    tokenizer: PreTrainedTokenizerBase,
    measured: Measured,
    measure: MeasureConfig,
    store: AnswerStore,
    show: Callable[[str, int, int | None], None],
) -> None:
    require_lm_eval()
    settings, missing = measure.harness_settings(), measured.missing_tasks(measure)
    with quiet():
        for benchmark in load_benchmarks(measure.tasks, settings):  # all of them, because num_fewshot may name any
            if benchmark.name in missing:
                scores = measure_benchmarks(modes, tokenizer, [benchmark], settings, store, show)
                measured.add_task(benchmark.name, measure, scores)


def _release_memory() -> None:
    """Give back what a model that is not used any more has taken."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Training may have let products of float32 be rounded; measuring alone does not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def is_finished(job: Job) -> bool:
    """Whether nothing of a job is left to do. One whose files cannot be read is not: whoever does it says why."""
    try:
        return job.is_finished if isinstance(job, SweepTeacher) else run_status(job) == "finished"
    except LolcatsError:
        return False
