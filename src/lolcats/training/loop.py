"""One training loop for both stages.

A stage says which parameters it trains and how a batch becomes gradients; the loop does the rest: batches, AdamW,
schedule, clipping, validation, checkpoints, metrics, progress, resume.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from lolcats.config import OptimConfig
from lolcats.data import PackedDataset
from lolcats.errors import LolcatsError
from lolcats.models.sharded import is_shard
from lolcats.training.batches import Batch, cut
from lolcats.training.checkpoint import (
    load_whole,
    parameter_tensors,
    read_metadata,
    restore_parameters,
    restore_training,
    training_tensors,
)
from lolcats.training.dynamics import Dynamics
from lolcats.training.gradients import clip_gradients, first_not_finite, reduce_gradients
from lolcats.training.graphs import GraphedStage
from lolcats.training.identity import identity
from lolcats.training.parallel import check_batch_size, check_same, from_main_process, on_main_process
from lolcats.training.reading import Reader
from lolcats.training.report import Reporter
from lolcats.training.resume import Checkpoints, Progress
from lolcats.training.schedule import Schedule
from lolcats.training.shards import write_apart
from lolcats.training.stage import Stage, TrainingData, TrainResult
from lolcats.training.teacher_pass import compute_ahead
from lolcats.training.windows import step_window

LARGEST_LR = torch.finfo(torch.float32).max / 10
"""AdamW divides it by 0.1 in its first step."""


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
    sharded: bool = False,
) -> TrainResult:
    """Run a stage to its end, from its last checkpoint if `folder` has one, and leave the best weights in the model.

    Args:
        folder: where `last.safetensors` and `best.safetensors` live.
        autocast: bfloat16 for mixed precision, None for none.
        sharded: each process holds a part of the model's weights, so all must run it together.

    Raises:
        LolcatsError: the loss or a weight is not finite, the checkpoint does not fit (other settings, data or weights),
            or there are more processes than sequences in a batch.
    """
    check_batch_size(stage.name, config, accelerator.num_processes, sharded)
    if config.lr > LARGEST_LR:
        raise LolcatsError(f"{stage.name}.lr is {config.lr:g}, more than a step in float32 can hold; lower it")
    loop = _Loop(stage, config, data, folder, reporter, accelerator, seed, autocast, sharded)
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
        sharded: bool,
    ) -> None:
        self.sharded = sharded
        graphs = accelerator.device.type == "cuda" and config.records_steps and not sharded
        self.stage: Stage = GraphedStage(stage) if graphs else stage
        self.config, self.data, self.folder = config, data, folder
        self.reporter, self.accelerator, self.seed, self.autocast = reporter, accelerator, seed, autocast
        self.length = data.train.ids.shape[1]
        self.reader = Reader(config, data, seed, accelerator.process_index, accelerator.num_processes)
        self.steps = self.reader.steps
        self.dynamics = Dynamics(stage, data, reporter, accelerator, autocast)
        self.parameters = stage.parameters()
        fused = accelerator.device.type == "cuda"
        groups = [[p for p in self.parameters.values() if is_shard(p) is spread] for spread in (False, True)]
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in groups if group],
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=fused,
        )
        self.schedule = Schedule(config, self.steps)
        self.progress = Progress()
        what = identity(stage, config, data)
        check_same(accelerator, what["data"], "the training data")
        check_same(accelerator, what["weights"], "the weights at the start of the stage")
        self.checkpoints = Checkpoints(folder, stage.name, self.steps, seed, what)

    def run(self) -> TrainResult:
        self._begin()
        left = range(self.progress.step, self.reader.passing_start)
        how = {"seed": self.seed, "accelerator": self.accelerator, "autocast": self.autocast}
        compute_ahead(self.stage, self.config, self.data, left, **how, say=self.reporter.say)
        with self.reporter.stage(self.stage.name, self.steps, self.progress.step) as bar:
            self.dynamics.begin(self.progress.step)
            while self.progress.step < self.steps:
                self._step(bar)
                done = self.progress.step == self.steps
                if validated := done or self.progress.step % self.config.validate_every == 0:
                    self._validate()
                if done or self.progress.step % self.config.checkpoint_every == 0:
                    self._save(validated)
        return self._finish()

    def _begin(self) -> None:
        """Start where the files are, or with the same weights in all processes."""
        self.progress = from_main_process(self.accelerator, self.checkpoints.find)
        if self.progress.schedule is not None:
            metadata = restore_training(self.checkpoints.last, self.parameters, self.optimizer)
            if metadata["step"] != self.progress.step:
                raise LolcatsError(f"{self.checkpoints.last} is at step {metadata['step']} here and at "
                                   f"{self.progress.step} in process 0; put the run on a shared disk")  # fmt: skip
            self.schedule.restore(self.progress.schedule)
        else:
            self._share_parameters()
        if self.progress.gap is None and self.reader.recall is not None:
            self.progress.gap = self.reader.recall.first_gap
        on_main_process(self.accelerator, lambda: self.reporter.resumed(self.stage.name, self.progress.step))

    def _share_parameters(self) -> None:
        """Give the main process's parameters to all."""
        if self.accelerator.num_processes > 1:
            for p in self.parameters.values():
                if not is_shard(p):
                    p.data.copy_(cast(Tensor, broadcast(p.data)))

    def _step(self, bar: Any) -> None:
        start = time.perf_counter()
        step = self.progress.step
        lr = self.schedule.lr(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        data, rows, chunk = self.reader.read(step, self.progress.gap)
        totals: dict[str, Tensor] = {}
        with self.stage.windowed(step_window(self.config, self.seed, step, self.steps)):
            for batch, share in self._micro_batches(data, rows, chunk, step):
                with self._precision():
                    metrics = self.stage.backward(batch, share)
                for name, value in metrics.items():
                    totals[name] = totals.get(name, 0) + value.float() * share
        trained = list(self.parameters.values())
        reduce_gradients(trained, self.accelerator)
        if self.accelerator.num_processes > 1:
            totals = cast(dict[str, Tensor], self.accelerator.reduce(totals, "sum"))
        norm = clip_gradients(trained, self.config.clip)
        values = {n: v.tolist() for n, v in totals.items()} | {"gradient_norm": float(norm)}
        self._check_finite(values, totals)
        values |= {} if self.progress.gap is None else {"recall_gap": self.progress.gap}
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.seconds += time.perf_counter() - start
        speed = self.progress.step * self.config.batch_size * self.length / self.progress.seconds
        self.reporter.step(bar, self.stage.name, self.progress.step, values, lr, speed, self._tokens())

    def _micro_batches(
        self, data: PackedDataset, rows: np.ndarray, chunk: int | None = None, step: int | None = None
    ) -> list[tuple[Batch, float]]:
        """Batches of `rows`, each with its share of the counted tokens: of all processes, in a `step` of training."""
        device, size = self.accelerator.device, self.config.micro_batch_size or self.config.batch_size
        keep_apart = self.data.keep_apart and chunk is None  # a long text is one document
        batches = cut(data, rows, size, device, keep_apart, chunk, step)
        counts = [self.stage.count(batch) for batch in batches]
        total = sum(counts)
        if self.accelerator.num_processes > 1 and step is not None:
            total = cast(Tensor, self.accelerator.reduce(torch.tensor(total, device=device), "sum")).item()
        return [(batch, count / (total or 1)) for batch, count in zip(batches, counts, strict=True)]

    def _check_finite(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"]):
            return
        what = f"the loss is {values['loss']} and the gradient norm {values['gradient_norm']}"
        raise self._not_finite(what, self.progress.step + 1, self.stage.where(tensors))

    def _not_finite(self, what: str, step: int, where: str = "") -> LolcatsError:
        last, name = self.checkpoints.last, self.stage.name
        kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint of this stage yet"
        return LolcatsError(f"{name}: {what} at step {step}{where}; {kept}. Lower the learning rate (it is "
                            f"{self.config.lr:g}: {name}.lr=...) and resume")  # fmt: skip

    def _validate(self) -> None:
        scores, recall = self._scores(np.arange(len(self.data.validation))), self.reader.recall
        if recall is not None:
            size = self.config.micro_batch_size or self.config.batch_size
            scores |= recall.measure(self.progress, self.accelerator.device, size, self._validate_batch)
        values = from_main_process(self.accelerator, lambda: scores)  # one opinion of what is best
        self._check_sound(values["loss"])
        if recall is not None:
            recall.judge(self.progress, values)
        self.schedule.observe(values["loss"])
        self.reporter.validation(self.stage.name, self.progress.step, values, self._tokens())
        self.dynamics.note(self.progress.step)
        if values["loss"] < self.progress.best["loss"] or self._is_first_of_passing():
            self.progress.best, self.progress.best_step = values, self.progress.step
            weights, shards = self._apart(self.checkpoints.best, parameter_tensors(self.parameters))
            on_main_process(self.accelerator, lambda: self.checkpoints.save_best(weights, self.progress, shards))

    def _is_first_of_passing(self) -> bool:
        """Whether the best weights are still those before the long texts, which no validation sequence can judge."""
        return self.progress.best_step <= self.reader.passing_start < self.progress.step

    def _scores(self, rows: np.ndarray) -> dict[str, Any]:
        """Metrics of sequences of the validation data."""
        totals: dict[str, Tensor] = {}
        for batch, share in self._micro_batches(self.data.validation, rows):
            for name, value in self._validate_batch(batch).items():
                totals[name] = totals.get(name, 0) + value.double() * share
        return {name: value.tolist() for name, value in totals.items()}

    def _validate_batch(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad(), self._precision():
            return self.stage.validate(batch)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, self.autocast, enabled=self.autocast is not None)

    def _check_sound(self, loss: float) -> None:
        """Refuse weights that are not finite, or whose loss is not: they must not be kept as a checkpoint."""
        if not math.isfinite(loss):
            raise self._not_finite(f"the validation loss is {loss}", self.progress.step)
        if name := first_not_finite(self.parameters, self.accelerator, self.sharded):
            raise self._not_finite(f"{name} holds numbers that are not finite", self.progress.step)

    def _tokens(self) -> int:
        return self.progress.step * self.config.batch_size * self.length

    def _save(self, validated: bool) -> None:
        """Write `last`; what the step before made of the weights is looked at first, unless it was just now."""
        if self.sharded and not validated:  # which takes all processes
            self._look_at_weights()
        tensors, shards = self._apart(self.checkpoints.last, training_tensors(self.parameters, self.optimizer))

        def write() -> None:
            if not self.sharded and not validated:
                self._look_at_weights()
            self.checkpoints.save_last(tensors, self.progress, self.schedule.state(), shards)

        on_main_process(self.accelerator, write)

    def _apart(self, file: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return write_apart(file, self.progress.step, self.accelerator, tensors)

    def _look_at_weights(self) -> None:
        cuda = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):  # the random numbers of the training go on as if nothing were asked
            self._check_sound(self._scores(np.arange(1))["loss"])

    def _finish(self) -> TrainResult:
        """Leave the best weights in the model of every process."""
        if from_main_process(self.accelerator, self._best_in_shards):  # which all processes read together
            self._restore_best()
        else:
            on_main_process(self.accelerator, self._restore_best)
        self._share_parameters()
        p = self.progress
        speed = self._tokens() / p.seconds if p.seconds else 0.0
        return TrainResult(
            p.step, self._tokens(), p.seconds, speed, p.best_step, p.best["loss"], p.best, changes=p.changes
        )

    def _best_in_shards(self) -> bool:
        best = self.checkpoints.best
        return best.exists() and "shards" in read_metadata(best)

    def _restore_best(self) -> None:
        best = self.checkpoints.best
        if best.exists():
            restore_parameters(best, load_whole(best, self.parameters)[0], self.parameters)
