"""Rows of vLLM's engine, which runs in a process of its own for each model."""

from __future__ import annotations

import dataclasses
import multiprocessing
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lolcats.errors import LolcatsError
from lolcats.evaluation.speed import Row, SpeedSettings, Subjects
from lolcats.serving.server import check_engine
from lolcats.serving.vllm_bench.engine import Case, Failure, Found, Order, run_engine
from lolcats.serving.vllm_bench.jobs import Job, find_jobs

ENGINE = "vllm"
"""The column `engine` of its rows."""
PATIENCE = 20
"""Seconds that a process has to end when it is asked to."""


def check_vllm() -> None:
    """Raise LolcatsError where there is no vLLM, or one that the plugin is not made for."""
    check_engine("Without it the engine transformers measures the model")


def measure_engine(
    subjects: Subjects,
    settings: SpeedSettings,
    bandwidth: float,
    report: Callable[[str, int, int | None], None] = lambda name, done, count: None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Row]:
    """Measure a model and its teacher, a row at a time.

    Args:
        subjects: the models.
        settings: at which batches and contexts; `graphs` leaves compilation and graphs to vLLM.
        bandwidth: bytes a second that the device moves, see `copy_bandwidth`.
        report: called with what is measured, rows of it that are done, and all of them.
        options: more arguments of `vllm.LLM`.

    Raises:
        LolcatsError: there is no vLLM, a model cannot be read, or vLLM cannot run it.
    """
    check_vllm()
    with tempfile.TemporaryDirectory(prefix="lolcats-") as folder:
        for job in find_jobs(subjects, settings, Path(folder), options or {}):
            order = dataclasses.replace(job.order, device=subjects.device.type)
            with closing(_answers(order, job.variant)) as answers:
                for done, case in enumerate(order.cases):
                    report(f"{job.variant}, batch {case.batch:,}, context {case.context:,}", done, len(order.cases))
                    yield _row(job, case, next(answers), bandwidth)


def _row(job: Job, case: Case, found: Found, bandwidth: float) -> Row:
    begin = case.context + case.lead
    end, moved = begin + job.order.tokens, job.cost.moved(case.batch, begin + job.order.tokens // 2)
    return Row(
        ENGINE, job.variant, job.mixer or found.attention, job.dtype, case.batch, case.context, job.order.tokens,
        found.times, limit=moved / bandwidth, step_bytes=moved, weight_bytes=job.cost.weights,
        text_bytes=job.cost.text(end), fit=found.fit,
    )  # fmt: skip


def _answers(order: Order, name: str) -> Generator[Found]:
    """What a process finds, case by case; it is gone when this is closed."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_engine, args=(order, sender))
    process.start()
    sender.close()
    left = len(order.cases)
    try:
        while left:
            found = _answer(receiver, process, name)
            left -= 1
            yield found
    finally:
        receiver.close()
        if not left:  # vLLM puts away what it has
            process.join(PATIENCE)
        process.terminate()
        process.join(PATIENCE)
        process.kill()
        process.join()


def _answer(receiver: Connection, process: Any, name: str) -> Found:
    wait([receiver, process.sentinel])
    try:
        found = receiver.recv() if receiver.poll() else None
    except EOFError:
        found = None
    if isinstance(found, Failure):
        raise LolcatsError(f"vLLM cannot measure the {name}: {found.reason}")
    if found is None:
        process.join(PATIENCE)
        raise LolcatsError(
            f"vLLM's process for the {name} ended with exit code {process.exitcode}; what it said is above, and "
            "VLLM_LOGGING_LEVEL=INFO has it say more"
        )
    return found
