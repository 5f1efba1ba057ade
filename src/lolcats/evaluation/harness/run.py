"""Run lm-eval's tasks on a model, its controls and its teacher."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lolcats.errors import LolcatsError
from lolcats.evaluation.compare import load_variants
from lolcats.evaluation.harness.scores import Scores
from lolcats.evaluation.perplexity import Variant
from lolcats.evaluation.store import AnswerStore
from lolcats.evaluation.variants import identities
from lolcats.identity import key_of
from lolcats.models.device import describe_device
from lolcats.models.device_map import DeviceMap
from lolcats.placing import main_device
from lolcats.silence import quiet
from lolcats.variants import CONTROLS, short_label

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lolcats.evaluation.harness.model import ResumableLM
    from lolcats.evaluation.harness.tasks import Benchmark

PYTHON_SEED, OTHER_SEED = 0, 1234
"""lm-eval's own, of Python's generator and of all others."""
Show = Callable[[str, int, "int | None"], None]
"""Called with (what is being measured, requests done, all of them or None where their number is not known)."""


@dataclass
class HarnessSettings:
    """How tasks are run; by default as lm-eval does, but for the five examples of MMLU, as in the paper."""

    task_data: Path | None = None
    """Folder of local files, see `lolcats.evaluation.harness.files`; None fetches data from the hub."""
    examples: Mapping[str, int] = field(default_factory=dict)
    """Examples in the prompt, by task or group; "*" stands for any."""
    seeds: Sequence[int] = ()
    """Each runs everything once; () is one run with lm-eval's own."""
    limit: int | None = None
    """Questions of each task (of each part of a group); None takes all."""
    batch_size: int = 1
    """lm-eval's own. Tasks that lm-eval runs in one call share batches, so only this gives its numbers in any case."""
    chat: bool = False
    """Write prompts in the tokenizer's chat template."""
    truncate: bool = False
    """Cut prompts that are too long for the model, at the left, instead of refusing them."""
    code: bool = False
    """Run code that the YAML file of a task names: functions, classes, metrics of the hub."""


def run_benchmarks(
    model: str | Path,
    tasks: Sequence[str],
    settings: HarnessSettings | None = None,
    *,
    teacher: str | Path | None = None,
    controls: Sequence[str] = CONTROLS,
    device: str = "auto",
    dtype: str = "auto",
    device_map: DeviceMap | None = None,
    progress_file: Path | None = None,
    show: Show | None = None,
) -> Scores:
    """Measure a linearized model, its controls and its teacher on tasks of lm-eval; or any other model by itself.

    Args:
        model, teacher, controls, device, dtype, device_map: see `lolcats.evaluation.compare`.
        tasks: names of lm-eval's tasks, groups or tags.
        settings: how they are run.
        progress_file: what was measured is kept here until all is done, so that the same call goes on after an
            interruption, to the same numbers; None keeps nothing.
        show: called as requests are answered.

    Raises:
        LolcatsError: lm-eval is missing, a task or its data cannot be had, or it does not fit the model.
    """
    settings = settings or HarnessSettings()
    require_lm_eval()
    with quiet():
        benchmarks = load_benchmarks(tasks, settings)  # before the model: mistakes show at once
        where = {"device": device, "dtype": dtype, "device_map": device_map}
        loaded = load_variants(model, teacher=teacher, controls=controls, **where)
        with AnswerStore(progress_file) as store:
            scores = measure_benchmarks(loaded.variants, loaded.tokenizer, benchmarks, settings, store, show)
    scores.memory = loaded.memory
    return scores


def require_lm_eval() -> None:
    """Raise LolcatsError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise LolcatsError('tasks are run by lm-eval, which is not installed: pip install "lolcats[eval]"')


def load_benchmarks(tasks: Sequence[str], settings: HarnessSettings) -> list[Benchmark]:
    """Build the tasks, with their data.

    Raises:
        LolcatsError: see `run_benchmarks`.
    """
    from lolcats.evaluation.harness.catalog import catalog
    from lolcats.evaluation.harness.files import TaskFiles
    from lolcats.evaluation.harness.tasks import ALL, load_benchmark

    known = catalog()
    known.check(tasks)
    files = None if settings.task_data is None else TaskFiles(settings.task_data, known)
    names = dict.fromkeys(tasks)
    loaded = [load_benchmark(name, known, files, settings.examples, settings.code) for name in names]
    parts = {name for benchmark in loaded for task in benchmark.tasks for name in (task, *known.lineage(task))}
    if stray := set(settings.examples) - parts - {ALL}:
        names = ", ".join(sorted(stray))
        raise LolcatsError(f"a number of examples names {names}, which is not among the tasks", hint="fewer_examples")
    return loaded


def measure_benchmarks(
    variants: Mapping[str, Variant],
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Sequence[Benchmark],
    settings: HarnessSettings,
    store: AnswerStore | None = None,
    show: Show | None = None,
) -> Scores:
    """Run loaded tasks on loaded models. See `run_benchmarks`."""
    from lolcats.evaluation.harness.model import ResumableLM, check_tokenizer

    store = store or AnswerStore()
    how = {"batch_size": settings.batch_size, "truncate": settings.truncate, "store": store}
    models: dict[str, ResumableLM] = {}
    for name, identity in identities(variants, tokenizer).items():
        model = variants[name].model
        check_tokenizer(model, tokenizer, chat=settings.chat)
        models[name] = ResumableLM(model, tokenizer, identity=key_of(identity, name, library_versions()), **how)
    first = next(iter(variants.values())).model
    place, dtype = describe_device(main_device(first)), str(first.dtype).removeprefix("torch.")
    scores = Scores([], {name: {} for name in variants}, device=place, dtype=dtype)
    for benchmark in benchmarks:
        answers: dict[str, dict[str, Any]] = {}
        for name, variant in variants.items():
            with variant.mode():
                answers[name] = {
                    "default" if seed is None else str(seed): _run(
                        benchmark, short_label(name), models[name], seed, settings, store, show
                    )
                    for seed in settings.seeds or (None,)
                }
        scores.add(benchmark.name, {row: benchmark.parts(row) for row in benchmark.rows}, answers)
    return scores


def _run(
    benchmark: Benchmark,
    variant: str,
    model: ResumableLM,
    seed: int | None,
    settings: HarnessSettings,
    store: AnswerStore,
    show: Show | None,
) -> dict[str, Any]:
    """lm-eval's results for one task, variant and seed; from an earlier run if they are there."""
    how = [settings.limit, settings.batch_size, settings.chat, settings.truncate]
    key = key_of(model.identity, benchmark.name, benchmark.digest, seed, how)
    if (found := store.get(key)) is None:
        label = f"{benchmark.name}, {variant}" + ("" if seed is None else f", seed {seed}")
        model.begin(benchmark.name, lambda done, count: show(label, done, count) if show else None)
        try:
            found = _evaluate(benchmark, model, seed, settings)
        except (OSError, ImportError, LookupError) as error:  # a metric that lm-eval fetches when it needs it
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise LolcatsError(f"{benchmark.name} cannot be scored by lm-eval here: {reason}") from error
        store.put(key, found)
    return found


def _evaluate(benchmark: Benchmark, model: ResumableLM, seed: int | None, settings: HarnessSettings) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    other = OTHER_SEED if seed is None else seed
    random.seed(PYTHON_SEED if seed is None else seed)
    np.random.seed(other)
    torch.manual_seed(other)
    benchmark.seed(other)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # it prints about its bootstrap
        results: Any = evaluate(
            lm=model,
            task_dict={"tasks": benchmark.tasks, "groups": benchmark.groups},
            limit=settings.limit,
            log_samples=False,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=True,
        )
    kept = {part: results[part] for part in ("results", "n-shot", "n-samples", "higher_is_better", "versions")}
    return json.loads(json.dumps(kept, default=float)) | {"truncated": model.truncated}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide over the scores."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "lm_eval", "datasets")}
