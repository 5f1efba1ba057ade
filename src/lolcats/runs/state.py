"""What the steps of the recipe share."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Concatenate, ParamSpec, TypeVar

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.config import RunConfig
from lolcats.data import check_sources
from lolcats.evaluation import Measurement
from lolcats.modeling import convert, linearized_layers
from lolcats.models.device import choose_dtype, describe_device
from lolcats.models.sharded import is_sharded
from lolcats.ops import kernels_available
from lolcats.runs.folder import RunFolder
from lolcats.runs.results import Results
from lolcats.training import FinetuneStage, Reporter, TrainingData
from lolcats.training.parallel import describe, from_main_process, on_main_process
from lolcats.training.recall import with_questions

P = ParamSpec("P")
T = TypeVar("T")
FORMATS = ("float32", "bfloat16", "float16")


@dataclass
class Run:
    """A run at work."""

    config: RunConfig
    folder: RunFolder
    accelerator: Accelerator
    reporter: Reporter
    console: Console | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    segments: Tensor
    results: Results
    started: float
    """Clock at which the run would have started if it had never been interrupted."""
    stage: FinetuneStage | None = None
    """Stage 2, once it has been trained."""
    widened: bool = False
    """Whether the weights were made float32 for it."""
    saved: dict[str, Measurement] = field(default_factory=dict)
    """What the artefact scores."""

    def count_seconds(self) -> None:
        """Bring `seconds.total` up to date."""
        self.results.seconds["total"] = round(time.perf_counter() - self.started, 2)

    def write_results(self) -> None:
        """Put results.json on disk, with the seconds up to now."""
        self.count_seconds()
        on_main_process(self.accelerator, lambda: self.folder.write_results(self.results))

    def say(self, text: str) -> None:
        """A line for the person watching."""
        if self.console is not None and self.accelerator.is_main_process:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return getattr(torch, self.results.dtype or "")

    def use_compiled(self, setting: str | bool) -> None:
        """Compile the layers' attention for training where that pays: on a GPU that the kernels do not know."""
        use_compiled(self.model, self.accelerator.device, setting)

    def attempt(self, what: str, action: Callable[[], object]) -> None:
        """Do something that is only shown or measured: where it fails the results get a note, and the run goes on."""
        self.results.forget_notes([what])
        try:
            action()
        except Exception as error:  # whatever it is: the trained weights are worth more than a number
            text = " ".join(describe(error).split())
            self.results.notes[what] = text
            self.say(f"{what} failed and is left out: {text}")


def use_compiled(model: PreTrainedModel, device: torch.device, setting: str | bool) -> None:
    """See `Run.use_compiled`."""
    wanted = device.type == "cuda" and not kernels_available(device) if setting == "auto" else setting
    for layer in linearized_layers(model):
        layer.mixer.impl = "compiled" if wanted else layer.mixer.eager_impl


def timed(what: str) -> Callable[[Callable[Concatenate[Run, P], T]], Callable[Concatenate[Run, P], T]]:
    """Decorate a part of a run: its time is added to the seconds of `what`."""

    def wrap(part: Callable[Concatenate[Run, P], T]) -> Callable[Concatenate[Run, P], T]:
        @functools.wraps(part)
        def measured(run: Run, *args: P.args, **kwargs: P.kwargs) -> T:
            start = time.perf_counter()
            try:
                return part(run, *args, **kwargs)
            finally:
                run.results.add_seconds(what, time.perf_counter() - start)

        return measured

    return wrap


def linearize_layers(model: PreTrainedModel, config: RunConfig, batch: Tensor, results: Results,
                     accelerator: Accelerator) -> RunConfig:  # fmt: skip
    """Convert the teacher; where its layers share a budget, by the split that the results hold, or else now will.

    Returns:
        The settings with this split.
    """
    layers = config.linearization
    if layers.searches and results.split is not None:
        layers = layers.model_copy(update={"split": results.split})
    # A sharded model runs in all processes or in none; they all find the same.
    decide = None if is_sharded(model) else partial(from_main_process, accelerator)
    convert(model, layers, input_ids=batch, decide=decide)
    if not config.linearization.searches:
        return config
    results.split = model.config.linearization["split"]
    return config.model_copy(update={"linearization": layers.model_copy(update={"split": results.split})})


def start_batch(config: RunConfig, data: TrainingData) -> Tensor:
    """The token ids [B, N] that layers start from, where they start from text.

    Where a stage reads questions about facts, every second row has them, of two rows at least: so a budget, which is
    shared by what heads do in these rows, knows which of them fetch facts.
    """
    rows, asks = config.transfer.micro_batch_size or config.transfer.batch_size, asks_for_facts(config)
    ids = data.train.ids[: max(2, rows) if asks else rows]
    return torch.from_numpy(with_questions(ids, data, config.seed) if asks else ids).long()


def asks_for_facts(config: RunConfig) -> bool:
    """Whether a stage that is done reads questions about facts."""
    return any(stage.enabled and stage.recall.share > 0 for stage in (config.transfer, config.finetune))


def open_run(
    folder: RunFolder, config: RunConfig, device: torch.device, held: ExitStack, resume: bool, overwrite: bool
) -> Results | None:
    """Open the run's folder, in the main process.

    Args:
        held: keeps other processes out of the run until it is closed.

    Returns:
        What the run has measured so far, with the format of its weights; None if it is finished.

    Raises:
        LolcatsError: see `RunFolder.prepare`; or another process works on the run, or text is missing.
    """
    if resume and folder.is_finished(config):
        return None
    if not resume:
        check_sources(config.data, config.evaluation.sources)  # before anything is written or loaded
    held.enter_context(folder.held())
    folder.prepare(config, resume=resume, overwrite=overwrite)
    asked = config.evaluation.model_dump(mode="json", exclude={"batch_size"})
    results = folder.results()
    results.complete = False  # its model is gone, and is made again
    if (results.measured_with or asked) != asked:
        results.forget_measurements()
    dtype = results.dtype if config.dtype == "auto" else None  # another device might choose another one
    if dtype not in FORMATS:
        dtype = str(choose_dtype(config.dtype, device)).removeprefix("torch.")
    results.dtype, results.measured_with = dtype, asked
    return results


def add_facts(results: Results, config: RunConfig, device: torch.device, segments: Tensor, prompt: str) -> None:
    """Put in what is known before anything is measured; what is there already stays."""
    results.date = results.date or datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    results.model, results.device = results.model or config.model, results.device or describe_device(device)
    results.quantization = results.quantization or config.quantization
    results.seed = config.seed if results.seed is None else results.seed
    results.generation.setdefault("prompt", prompt)
    text = results.evaluation
    text.segments, text.length, text.last = segments.shape[0], segments.shape[1], config.evaluation.last
