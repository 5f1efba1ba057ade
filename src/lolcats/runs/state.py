"""What the steps of the recipe share."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.config import RunConfig
from lolcats.data import check_sources
from lolcats.evaluation import Measurement
from lolcats.modeling import linearized_layers
from lolcats.models.device import choose_dtype, describe_device
from lolcats.ops import kernels_available
from lolcats.runs.folder import RunFolder
from lolcats.training import Reporter, TrainingData
from lolcats.training.parallel import describe, on_main_process

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
    results: dict[str, Any]
    started: float
    """Clock at which the run would have started if it had never been interrupted."""

    def count_seconds(self) -> None:
        """Bring `seconds.total` up to date."""
        self.results["seconds"]["total"] = round(time.perf_counter() - self.started, 2)

    def write_results(self) -> None:
        """Put results.json on disk."""
        on_main_process(self.accelerator, lambda: self.folder.write_results(self.results))

    def say(self, text: str) -> None:
        """A line for the person watching."""
        if self.console is not None and self.accelerator.is_main_process:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def store(self, name: str, score: Measurement) -> None:
        """Put what a variant scores into the results."""
        values = asdict(score)
        self.results["perplexity"][name] = values["perplexity"]
        if values["kl"] is not None:
            self.results["kl"][name] = values["kl"]
        self.results["by_position"][name] = values["by_position"]
        self.results["evaluation"]["tokens"] = values["tokens"]

    def use_compiled(self, setting: str | bool) -> None:
        """Compile the layers' attention for training where that pays: on a GPU that the kernels do not know."""
        device = self.accelerator.device
        wanted = device.type == "cuda" and not kernels_available(device) if setting == "auto" else setting
        for layer in linearized_layers(self.model):
            layer.impl = "compiled" if wanted else layer.eager_impl

    def attempt(self, what: str, action: Callable[[], object]) -> None:
        """Do something that is only shown or measured: where it fails the results get a note, and the run goes on."""
        self.forget_notes([what])
        try:
            action()
        except Exception as error:  # whatever it is: the trained weights are worth more than a number
            text = " ".join(describe(error).split())
            self.results.setdefault("notes", {})[what] = text
            self.say(f"{what} failed and is left out: {text}")

    def forget_notes(self, names: Sequence[str]) -> None:
        """Leave out notes of an earlier process on what is done again."""
        notes = {name: text for name, text in self.results.pop("notes", {}).items() if name not in names}
        if notes:
            self.results["notes"] = notes


def open_run(
    folder: RunFolder, config: RunConfig, device: torch.device, held: ExitStack, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
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
    results.pop("complete", None)  # its model is gone, and is made again
    if results.get("measured_with", asked) != asked:
        _forget_measurements(results)
    dtype = results.get("dtype") if config.dtype == "auto" else None  # another device might choose another one
    if dtype not in FORMATS:
        dtype = str(choose_dtype(config.dtype, device)).removeprefix("torch.")
    return results | {"dtype": dtype, "measured_with": asked}


def with_facts(
    results: dict[str, Any], config: RunConfig, device: torch.device, segments: Tensor, prompt: str
) -> dict[str, Any]:
    """Results with what is known before anything is measured; what they hold already stays."""
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    facts = {"date": date, "model": config.model, "device": describe_device(device), "dtype": results["dtype"]}
    facts |= {"quantization": config.quantization, "seed": config.seed, "evaluation": {}}
    sections = {name: {} for name in ("perplexity", "kl", "by_position", "tokens", "tokens_per_second", "seconds")}
    results = {**facts, **sections, "generation": {"prompt": prompt}, **results}
    results["evaluation"] |= {
        "segments": segments.shape[0],
        "length": segments.shape[1],
        "last": config.evaluation.last,
    }
    return results


def _forget_measurements(results: dict[str, Any]) -> None:
    """Leave out what was measured on another text or in another way."""
    for name in ("perplexity", "kl", "by_position", "notes"):
        results.pop(name, None)
