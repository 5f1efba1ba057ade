"""One training loop for both stages.

A stage says which parameters it trains and how a batch becomes gradients; the loop does the rest: batches, AdamW,
schedule, clipping, validation, checkpoints, metrics, progress, resume.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from lolcats.config import OptimConfig
from lolcats.data import PackedDataset
from lolcats.errors import LolcatsError
from lolcats.training.batches import Batch, make_batch, step_rows
from lolcats.training.checkpoint import (
    load_tensors,
    restore_parameters,
    restore_training,
    save_tensors,
    training_tensors,
)
from lolcats.training.graphs import GraphedStage
from lolcats.training.report import Reporter
from lolcats.training.schedule import Schedule


class Stage(Protocol):
    """What differs between attention transfer and fine-tuning."""

    name: str
    """Folder of the checkpoints and `stage` in the metrics."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, float32, by name."""
        ...

    def count(self, batch: Batch) -> int:
        """Tokens over which the loss of the batch is a mean: the weight of a micro-batch in its step."""
        ...

    def backward(self, batch: Batch, share: float | Tensor) -> dict[str, Tensor]:
        """Add `share` times the gradient of the batch; return metrics, "loss" among them (detached, not yet read)."""
        ...

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Metrics of a batch without gradients; "loss" decides which checkpoint is best."""
        ...

    def where(self, metrics: Mapping[str, Tensor]) -> str:
        """Which part of the model made these metrics not finite, for the error message ("" if unknown)."""
        ...


@dataclass
class TrainingData:
    """Sequences to learn from and to validate on."""

    train: PackedDataset
    validation: PackedDataset
    keep_apart: bool = False
    """Whether attention stops at document boundaries."""


@dataclass
class TrainResult:
    """Outcome of one stage."""

    steps: int
    tokens: int
    seconds: float
    """Time spent on training steps, validation and checkpoints left out."""
    tokens_per_second: float
    best_step: int
    best_loss: float
    final: dict[str, float] = field(default_factory=dict)
    """Validation metrics at the best step."""


@dataclass
class _Progress:
    step: int = 0
    seconds: float = 0.0
    best_step: int = -1
    best: dict[str, float] = field(default_factory=lambda: {"loss": math.inf})


def train(
    stage: Stage,
    config: OptimConfig,
    data: TrainingData,
    folder: Path,
    reporter: Reporter,
    *,
    accelerator: Accelerator,
    seed: int,
    autocast: torch.dtype | None = None,
) -> TrainResult:
    """Run a stage to its end, from its last checkpoint if `folder` has one, and leave the best weights in the model.

    Args:
        folder: where `last.safetensors` and `best.safetensors` live.
        autocast: bfloat16 for mixed precision, None for none.

    Raises:
        LolcatsError: the loss is not finite, or the checkpoint does not fit.
    """
    loop = _Loop(stage, config, data, folder, reporter, accelerator, seed, autocast)
    return loop.run()


class _Loop:
    def __init__(
        self,
        stage: Stage,
        config: OptimConfig,
        data: TrainingData,
        folder: Path,
        reporter: Reporter,
        accelerator: Accelerator,
        seed: int,
        autocast: torch.dtype | None,
    ) -> None:
        graphs = accelerator.device.type == "cuda" and config.cuda_graph
        self.stage: Stage = GraphedStage(stage) if graphs else stage
        self.config, self.data, self.folder = config, data, folder
        self.reporter, self.accelerator, self.seed, self.autocast = reporter, accelerator, seed, autocast
        self.length = data.train.ids.shape[1]
        self.steps = config.steps(self.length)
        self.parameters = stage.parameters()
        fused = accelerator.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=config.lr, weight_decay=config.weight_decay, fused=fused
        )
        self.schedule = Schedule(config, self.steps)
        self.progress = _Progress()

    def run(self) -> TrainResult:
        last = self.folder / "last.safetensors"
        if last.exists():
            self._restore(last)
        else:
            self.reporter.resumed(self.stage.name, 0)
        with self.reporter.stage(self.stage.name, self.steps, self.progress.step) as bar:
            while self.progress.step < self.steps:
                self._step(bar)
                done = self.progress.step == self.steps
                if done or self.progress.step % self.config.validate_every == 0:
                    self._validate()
                if done or self.progress.step % self.config.checkpoint_every == 0:
                    self._save(last)
        return self._finish()

    def _step(self, bar: Any) -> None:
        start = time.perf_counter()
        step, device = self.progress.step, self.accelerator.device
        lr = self.schedule.lr(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        rows = step_rows(len(self.data.train), step, self.config.batch_size, self.seed)
        rows = rows[self.accelerator.process_index :: self.accelerator.num_processes]
        totals: dict[str, Tensor] = {}
        for batch, share in self._micro_batches(self.data.train, rows):
            with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
                metrics = self.stage.backward(batch, share)
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0) + value.float() * share
        totals = self._reduce(totals)
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.clip)
        values = {n: v.tolist() for n, v in totals.items()} | {"gradient_norm": float(norm)}
        self._check_finite(values, totals)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.seconds += time.perf_counter() - start
        speed = self.progress.step * self.config.batch_size * self.length / self.progress.seconds
        self.reporter.step(bar, self.stage.name, self.progress.step, values, lr, speed, self._tokens())

    def _micro_batches(self, data: PackedDataset, rows: np.ndarray, alone: bool = False) -> list[tuple[Batch, float]]:
        """Batches of `rows`, each with its share of the counted tokens (of all processes, unless `alone`)."""
        device, size = self.accelerator.device, self.config.micro_batch_size or self.config.batch_size
        parts = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        batches = [make_batch(data, part, device, self.data.keep_apart) for part in parts]
        counts = [self.stage.count(batch) for batch in batches]
        total = sum(counts)
        if self.accelerator.num_processes > 1 and not alone:
            total = int(cast(Tensor, self.accelerator.reduce(torch.tensor(total, device=device), "sum")))
        return [(batch, count / max(1, total)) for batch, count in zip(batches, counts, strict=True)]

    def _reduce(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add up gradients and metrics over processes: only the few trained parameters, once a step."""
        if self.accelerator.num_processes == 1:
            return metrics
        for p in self.parameters.values():
            if p.grad is not None:
                p.grad = cast(Tensor, self.accelerator.reduce(p.grad, "sum"))
        return cast(dict[str, Tensor], self.accelerator.reduce(metrics, "sum"))

    def _check_finite(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]):
            return
        raise LolcatsError(
            f"{self.stage.name}: the loss is {values['loss']} and the gradient norm {values['gradient_norm']} at step "
            f"{self.progress.step + 1}{self.stage.where(tensors)}; the last good checkpoint is in {self.folder}. "
            "Lower the learning rate and resume"
        )

    def _validate(self) -> None:
        device, totals = self.accelerator.device, {}
        data = self.data.validation
        for batch, share in self._micro_batches(data, np.arange(len(data)), alone=True):
            with torch.no_grad(), torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
                for name, value in self.stage.validate(batch).items():
                    totals[name] = totals.get(name, 0) + value.double() * share
        values = {name: value.tolist() for name, value in totals.items()}
        self.schedule.observe(values["loss"])
        self.reporter.validation(self.stage.name, self.progress.step, values, self._tokens())
        if values["loss"] < self.progress.best["loss"]:
            self.progress.best, self.progress.best_step = values, self.progress.step
            if self.accelerator.is_main_process:
                weights = {f"parameter:{n}": p for n, p in self.parameters.items()}
                save_tensors(self.folder / "best.safetensors", weights, {"step": self.progress.step, **values})

    def _tokens(self) -> int:
        return self.progress.step * self.config.batch_size * self.length

    def _save(self, path: Path) -> None:
        if not self.accelerator.is_main_process:
            return
        p = self.progress
        metadata = {"stage": self.stage.name, "step": p.step, "steps": self.steps, "seconds": p.seconds}
        metadata |= {"best": p.best, "best_step": p.best_step, "schedule": self.schedule.state(), "seed": self.seed}
        save_tensors(path, training_tensors(self.parameters, self.optimizer), metadata)

    def _restore(self, path: Path) -> None:
        metadata = restore_training(path, self.parameters, self.optimizer)
        if metadata.get("stage") != self.stage.name or metadata.get("steps") != self.steps:
            raise LolcatsError(
                f"{path} is of stage {metadata.get('stage')!r} with {metadata.get('steps')} steps; this run's is "
                f"{self.stage.name!r} with {self.steps}. Use the run's own configuration or another name"
            )
        if metadata.get("seed", self.seed) != self.seed:
            raise LolcatsError(f"{path} was made with seed {metadata['seed']}, not {self.seed}: the order of the data "
                               "would change; use the run's own seed or another name")  # fmt: skip
        self.progress = _Progress(metadata["step"], metadata["seconds"], metadata["best_step"], metadata["best"])
        self.schedule.restore(metadata["schedule"])
        self.reporter.resumed(self.stage.name, self.progress.step)

    def _finish(self) -> TrainResult:
        best = self.folder / "best.safetensors"
        if self.accelerator.is_main_process and best.exists():
            restore_parameters(best, load_tensors(best)[0], self.parameters)
        if self.accelerator.num_processes > 1:
            for p in self.parameters.values():
                p.data.copy_(cast(Tensor, broadcast(p.data)))
        p = self.progress
        speed = self._tokens() / p.seconds if p.seconds else 0.0
        return TrainResult(p.step, self._tokens(), p.seconds, speed, p.best_step, p.best["loss"], p.best)
