"""Run the benchmarks and recall tasks of a sweep on one model, as `lolcats evaluate` does."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedTokenizerBase

from lolcats.config.variants import VARIANTS
from lolcats.errors import LolcatsError
from lolcats.evaluation.compare import load_variants
from lolcats.evaluation.perplexity import Variant
from lolcats.evaluation.recall import recall
from lolcats.models.context import check_context
from lolcats.sweep.disk import empty_model
from lolcats.sweep.measure import MeasureConfig
from lolcats.sweep.measured import Measured
from lolcats.sweep.settings import Sweep

SAID = {
    "--num-fewshot": "measure.num_fewshot",
    "--task-data DIR": "measure.task_data=DIR",
    "--task-code": "`lolcats evaluate --task-code`",
    "--truncate": "`lolcats evaluate --truncate`",
    "--beyond-context": "`lolcats evaluate --beyond-context`",
}
"""Options of `lolcats evaluate` in messages -> what a sweep has in their place."""
Say = Callable[[str], None]


def check_measure(sweep: Sweep, *, fetch: bool = True) -> None:
    """See that everything can be measured before anything is trained.

    Args:
        fetch: also get what is on the hub; else tasks are looked up by name, where lm-eval is installed.

    Raises:
        LolcatsError: lm-eval is missing, a task or its data cannot be had, or a length is beyond a model's context.
    """
    measure = sweep.measure
    with _sweep_words():
        if measure.tasks and (fetch or importlib.util.find_spec("lm_eval")):
            _check_tasks(measure, fetch)
        for source in dict.fromkeys(run.config.model for run in sweep.runs) if measure.recall else ():
            if (model := empty_model(source)) is not None:
                check_context(model, max(measure.lengths), "measure.lengths: a prompt", beyond=False)


def _check_tasks(measure: MeasureConfig, fetch: bool) -> None:
    from lolcats.evaluation.harness.run import load_benchmarks, require_lm_eval

    require_lm_eval()
    from lolcats.evaluation.harness.catalog import catalog
    from lolcats.evaluation.harness.quiet import quiet

    with quiet():
        if fetch or measure.task_data is not None:
            load_benchmarks(measure.tasks, measure.harness_settings())
        else:
            catalog().check(measure.tasks)


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
        measured: where the numbers go.
        teacher: of a linearized model, for the controls that have its weights.
        device, dtype: as in `RunConfig`; the "auto" dtype of a linearized model is its own.
        say: where progress is shown.

    Raises:
        LolcatsError: a task or its data cannot be had, or does not fit the model.
    """
    if measured.is_complete(measure):
        return
    with _sweep_words(), _full_precision():
        needed = any(row.weights == "teacher" for row in VARIANTS if row.name in measure.controls)
        loaded = load_variants(
            source, teacher=teacher if needed else None, controls=measure.controls, device=device, dtype=dtype
        )
        name = "student" if "student" in loaded.variants else "teacher"
        modes = {key: mode for key, mode in loaded.variants.items() if key == name or key != "teacher"}
        said: set[str] = set()

        def show(label: str, done: int, count: int | None) -> None:
            if label not in said:
                said.add(label)
                say(f"measuring: {label}")

        if tasks := measured.missing_tasks(measure):
            _measure_tasks(modes, loaded.tokenizer, tasks, measured, measure, show)
        if measured.missing_cells(measure):
            progress = measured.recall_progress(measure)
            how = {"batch_size": measure.batch_size, "progress": progress, "report": show}
            recall({name: modes[name]}, loaded.tokenizer, measure.recall_settings(), **how)
    for column, score in measured.columns(measure).items():
        say(f"{name:<14} {column} " + ("-" if score.value is None else f"{score.value:.4f}"))


def _measure_tasks(
    modes: dict[str, Variant],
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    measured: Measured,
    measure: MeasureConfig,
    show: Callable[..., None],
) -> None:
    from lolcats.evaluation.harness.progress import Progress
    from lolcats.evaluation.harness.quiet import quiet
    from lolcats.evaluation.harness.run import load_benchmarks, measure_benchmarks, require_lm_eval

    require_lm_eval()
    measured.file.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress(measured.file.with_name(measured.file.name + ".progress"))
    settings = measure.harness_settings()
    done = False
    try:
        with quiet():
            # All of them, because num_fewshot may name any.
            for benchmark in load_benchmarks(measure.tasks, settings):
                if benchmark.name in tasks:
                    scores = measure_benchmarks(modes, tokenizer, [benchmark], settings, progress, show)
                    measured.add_task(benchmark.name, measure, scores, scores.rows)
        done = True
    finally:
        progress.close(remove=done)


def release_memory() -> None:
    """Give back what a model that is not used any more has taken."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Training may have let products of float32 be rounded; `lolcats evaluate` does not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _sweep_words() -> Iterator[None]:
    try:
        yield
    except LolcatsError as error:
        text = str(error)
        for option, key in SAID.items():
            text = text.replace(option, key)
        raise type(error)(text) from error
