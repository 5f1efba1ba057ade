"""The whole recipe: load, convert, transfer, fine-tune, save, measure."""

from __future__ import annotations

import datetime
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.config import RunConfig
from lolcats.data import build_datasets, check_sources
from lolcats.data.build import vocabulary_size
from lolcats.data.notes import notes_on_data
from lolcats.device import choose_device, choose_dtype, describe_device
from lolcats.evaluation import Measurement, Variant, measure, student_variants, teacher_variants
from lolcats.evaluation.segments import evaluation_segments
from lolcats.generation import sample
from lolcats.modeling import attention_mode, convert, linearized_layers
from lolcats.modeling.hf import cast_weights
from lolcats.modeling.start import match_start
from lolcats.ops import kernels_available
from lolcats.processes import on_main_process
from lolcats.quantization import dequantize, dequantize_below
from lolcats.run_folder import RunFolder
from lolcats.saving import save_artefact
from lolcats.teacher import load_teacher
from lolcats.training import FinetuneStage, Reporter, TrainingData, TrainResult, TransferStage, train
from lolcats.training.loop import Stage

SAMPLE_PROMPT = "The most important thing to know about computers is"


@dataclass
class _Run:
    """What the steps of the recipe share."""

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
            self.console.print(text, highlight=False)


def linearize(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, console: Console | None = None
) -> RunFolder:
    """Turn a softmax language model into a linearized one.

    Args:
        config: all settings.
        resume: go on with the run of the same name from its last checkpoint.
        overwrite: delete the run of the same name first.
        console: where progress is shown; None is silent.

    Returns:
        The run's folder: `folder.model` is the artefact, `folder.results()` what was measured.

    Raises:
        LolcatsError: anything the user can mend; the message says how.
    """
    started = time.perf_counter()
    device = choose_device(config.device)
    accelerator = Accelerator(cpu=device.type == "cpu")
    if not resume:
        check_sources(config.data, config.evaluation.sources)  # before anything is written or loaded
    folder = RunFolder.of(config)
    on_main_process(accelerator, lambda: folder.prepare(config, resume=resume, overwrite=overwrite))
    if resume and folder.results().get("complete"):
        return folder
    run = _prepare(config, folder, accelerator, device, console, started)
    measure_teacher(run)
    transfer(run)
    finetune(run)
    run.results["complete"] = True
    run.count_seconds()
    on_main_process(accelerator, lambda: save_artefact(folder.model, run.model, run.tokenizer, config, run.results))
    run.write_results()
    return folder


def _prepare(
    config: RunConfig,
    folder: RunFolder,
    accelerator: Accelerator,
    device: torch.device,
    console: Console | None,
    started: float,
) -> _Run:
    set_seed(config.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 holds bf16 operands exactly
    dtype = choose_dtype(config.dtype, device)
    model, tokenizer = load_teacher(config.model, dtype, device, config.quantization)
    shown = console if accelerator.is_main_process else None
    train_set, validation = build_datasets(
        config.data, tokenizer, config.seed, teacher=model, console=shown, others=config.evaluation.sources
    )
    data = TrainingData(train_set, validation, keep_apart=config.data.packing == "documents")
    segments = evaluation_segments(config, tokenizer, validation, vocabulary_size(model))
    notes = notes_on_data(config, len(train_set) * train_set.ids.shape[1], shown)
    reporter = Reporter(folder.metrics_file, console, enabled=accelerator.is_main_process)
    results = folder.results() or {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "model": config.model,
        "device": describe_device(device),
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": config.quantization,
        "seed": config.seed,
        "evaluation": {"segments": segments.shape[0], "length": segments.shape[1], "last": config.evaluation.last},
        "notes": notes,
        "perplexity": {},
        "kl": {},
        "by_position": {},
        "tokens": {},
        "tokens_per_second": {},
        "seconds": {},
        "generation": {"prompt": SAMPLE_PROMPT},
    }
    batch = torch.from_numpy(train_set.ids[: config.transfer.micro_batch_size or config.transfer.batch_size]).long()
    convert(model, config.linearization, input_ids=batch)
    layers = linearized_layers(model)
    started -= results["seconds"].get("total", 0.0)
    run = _Run(config, folder, accelerator, reporter, console, model, tokenizer, data, segments, results, started)
    run.say(
        f"{type(model).__name__}: {len(layers)} of {model.config.num_hidden_layers} layers linearized, "
        f"{len(train_set):,} training sequences of {train_set.ids.shape[1]:,} tokens, "
        f"{results['device']}, {results['dtype']}"
    )
    return run


def measure_teacher(run: _Run) -> None:
    """Teacher and training-free control, before anything is trained."""
    if "teacher" not in run.results["perplexity"]:
        variants = teacher_variants(run.model)
        if "training_free" not in run.config.evaluation.controls:
            del variants["training_free"]
        _record(run, variants, variants["teacher"])
        with attention_mode(run.model, "softmax"):
            run.results["generation"]["teacher"] = sample(run.model, run.tokenizer, SAMPLE_PROMPT)
        run.count_seconds()
        run.write_results()


def transfer(run: _Run) -> None:
    """Stage 1."""
    config = run.config.transfer
    if not config.enabled:
        return
    _use_compiled(run, config.compile)
    stage = TransferStage(run.model, config)
    _train(run, stage, config)
    run.model.requires_grad_(False)
    if config.target == "linear" and run.config.linearization.start == "matched":
        # The linear half was trained by itself, which leaves its share beside the window open.
        match_start(run.model, linearized_layers(run.model), torch.from_numpy(run.data.train.ids[:4]).long())
    if "transfer" not in run.results["perplexity"]:
        _record(run, {"transfer": student_variants(run.model, [])["student"]}, teacher_variants(run.model)["teacher"])
        run.count_seconds()
        run.write_results()


def finetune(run: _Run) -> None:
    """Stage 2, then the student and its controls; adapters are merged at the end if the settings say so."""
    config = run.config.finetune
    stage = None
    widened = _slow_backward(run)
    if config.enabled:
        if widened:
            cast_weights(run.model, torch.float32)
        set_seed(run.config.seed)  # the adapters' start must not depend on whether stage 1 was resumed
        stage = FinetuneStage(run.model, config)
        _train(run, stage, config)
    _use_compiled(run, False)
    variants = student_variants(run.model, list(run.config.evaluation.controls))
    _record(run, variants, _teacher_after(run, stage))
    if run.config.quantization != "none":
        _dequantize(run, stage)
    if stage is not None and (adapter := stage.finish()) is not None:
        # The artefact always holds merged weights; the adapter is kept apart, for those who want it alone.
        on_main_process(run.accelerator, lambda: adapter.save_pretrained(str(run.folder.adapter)))
        adapter.merge_and_unload()
    if widened:
        cast_weights(run.model, torch.bfloat16)
    if stage is not None:
        # The artefact has its adapters merged into weights of lower precision: its own number is the one to report.
        _record(run, {"student": student_variants(run.model, [])["student"]}, None, note=" (as saved)")
    run.results["generation"]["student"] = sample(run.model, run.tokenizer, SAMPLE_PROMPT)


def _teacher_after(run: _Run, stage: FinetuneStage | None) -> Variant:
    """The teacher of the student: the same weights without adapters, or loaded anew where they were trained."""
    if stage is None:
        return teacher_variants(run.model)["teacher"]
    if stage.adapter is not None:
        return teacher_variants(run.model, stage.adapter.disable_adapter)["teacher"]
    if stage.teacher is not None:
        return teacher_variants(stage.teacher)["teacher"]
    return Variant(load_teacher(run.config.model, getattr(torch, run.results["dtype"]), run.model.device)[0])


def _dequantize(run: _Run, stage: FinetuneStage | None) -> None:
    """Ordinary weights for the artefact, before adapters are merged into them."""
    dtype = getattr(torch, run.results["dtype"])
    if stage is not None and stage.adapter is not None:
        stage.adapter = dequantize_below(stage.adapter, dtype)
    else:
        dequantize(run.model, dtype)


def _slow_backward(run: _Run) -> bool:
    """Whether stage 2 is better done in float32: CPUs run bfloat16 forward twice as fast, but backward far slower."""
    if run.config.quantization != "none":
        return False
    return run.config.dtype == "auto" and run.accelerator.device.type == "cpu" and run.results["dtype"] == "bfloat16"


def _train(run: _Run, stage: Stage, config: Any) -> TrainResult:
    autocast = torch.bfloat16 if next(run.model.parameters()).dtype == torch.bfloat16 else None
    result = train(
        stage,
        config,
        run.data,
        run.folder.checkpoints(stage.name),
        run.reporter,
        accelerator=run.accelerator,
        seed=run.config.seed,
        autocast=autocast,
    )
    run.results["tokens"][stage.name] = result.tokens
    run.results["tokens_per_second"][stage.name] = round(result.tokens_per_second, 1)
    run.results["seconds"][stage.name] = round(result.seconds, 2)
    run.results.setdefault("best", {})[stage.name] = {"step": result.best_step, "loss": result.best_loss}
    run.say(
        f"{stage.name}: {result.tokens:,} tokens in {result.seconds:,.0f} s "
        f"({result.tokens_per_second:,.0f} tokens/s), "
        f"best validation loss {result.best_loss:.4g} at step {result.best_step} of {result.steps}"
    )
    return result


def _record(
    run: _Run,
    variants: dict[str, Variant],
    teacher: Variant | None,
    note: str = "",
) -> None:
    """Measure and put the numbers into the results; without a teacher, no distance from it."""
    e = run.config.evaluation
    scores = measure(variants, run.segments, teacher=teacher, last=e.last, batch_size=e.batch_size)
    for name, score in scores.items():
        _store(run.results, name, score)
        distance = "" if score.kl is None or name == "teacher" else f", KL to the teacher {score.kl:.4f}"
        run.say(f"{name:<14} perplexity {score.perplexity:.2f}{distance}{note}")


def _store(results: dict[str, Any], name: str, score: Measurement) -> None:
    values = asdict(score)
    results["perplexity"][name] = values["perplexity"]
    if values["kl"] is not None:
        results["kl"][name] = values["kl"]
    results["by_position"][name] = values["by_position"]
    results["evaluation"]["tokens"] = values["tokens"]


def _use_compiled(run: _Run, setting: str | bool) -> None:
    """Compile the layers' attention for training where that pays: on a GPU that the kernels do not know."""
    device = run.accelerator.device
    wanted = device.type == "cuda" and not kernels_available(device) if setting == "auto" else setting
    for layer in linearized_layers(run.model):
        layer.impl = "compiled" if wanted else layer.eager_impl
