"""The whole recipe: prepare, transfer, fine-tune, save, train the control, measure. `steps.py` does each by itself."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console

from lolcats.config import RunConfig
from lolcats.data import build_datasets
from lolcats.data.notes import notes_on_data
from lolcats.errors import LolcatsError
from lolcats.evaluation import Variant, evaluation_segments, student_variants, teacher_variants
from lolcats.evaluation.memory import text_memory
from lolcats.modeling import attention_mode, check_model, linearized_layers
from lolcats.modeling.convert import check_supported
from lolcats.modeling.hf import cast_weights
from lolcats.modeling.modules import attention_modules, choose_layers
from lolcats.modeling.start import start_from_text
from lolcats.models.device import check_impl, choose_device
from lolcats.models.generation import sample
from lolcats.models.sharded import is_sharded
from lolcats.models.vocabulary import vocabulary_size
from lolcats.runs.artefact import save_adapter, save_artefact, save_results, unchanged, unpack
from lolcats.runs.blocks import train_blocks
from lolcats.runs.blocks.plan import check_plan
from lolcats.runs.control import train_control
from lolcats.runs.folder import RunFolder
from lolcats.runs.loading import load_model
from lolcats.runs.parts import measuring, record, teacher_of, train_stage
from lolcats.runs.results import Results
from lolcats.runs.sharded import save_sharded
from lolcats.runs.state import Run, add_facts, linearize_layers, open_run, start_batch
from lolcats.runs.trained import added_tensors, save_added
from lolcats.training import FinetuneStage, Reporter, TrainingData, TransferStage
from lolcats.training.lora import check_lora
from lolcats.training.parallel import check_batch_size, ending_together, from_main_process, on_main_process
from lolcats.training.reading import check_reading
from lolcats.training.sharding import shards_weights
from lolcats.training.teacher_logits import check_logits
from lolcats.training.trackers import check_trackers, trackers_of

Step = Literal["prepare", "transfer", "finetune", "save", "control", "measure"]
STEPS: list[Step] = ["prepare", "transfer", "finetune", "save", "control", "measure"]
SAMPLE_PROMPT = "The most important thing to know about computers is"


def linearize(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    until: Step = "measure",
    console: Console | None = None,
) -> RunFolder:
    """Turn a softmax language model into a linearized one.

    Args:
        config: all settings.
        resume: go on with the run of the same name from its last checkpoint.
        overwrite: delete the run of the same name first.
        until: the last step to do; `resume` does those after it.
        console: where progress is shown; None is silent.

    Returns:
        The run's folder: `folder.model` is the artefact, `folder.results()` what was measured.

    Raises:
        LolcatsError: anything the user can mend; the message says how.
    """
    started = time.perf_counter()
    device = choose_device(config.device)
    check_impl(config.linearization.impl, device)
    check_trackers(config.report_to)
    by_blocks = config.transfer.enabled and config.transfer.blocks.size is not None
    if by_blocks:
        check_plan(config)
    folder = RunFolder.of(config)
    with ending_together(lambda: Accelerator(cpu=device.type == "cpu")) as accelerator, ExitStack() as held:
        for stage in ("transfer", "finetune"):
            if (settings := getattr(config, stage)).enabled:
                check_batch_size(
                    stage, settings, accelerator.num_processes, shards_weights(config.finetune, accelerator)
                )
        results = from_main_process(accelerator, lambda: open_run(folder, config, device, held, resume, overwrite))
        if results is None:
            return folder
        if device.type == "cuda":
            held.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("high")  # TF32 holds bf16 operands exactly
        if by_blocks:
            shown = console if accelerator.is_main_process else None
            train_blocks(config, folder, device, results, accelerator, shown, only_prepare=until == "prepare")
        run = _prepare(config, folder, accelerator, device, console, results, started)
        held.push(lambda kind, *_: run.reporter.trackers.close(failed=kind is not None))
        results.add_seconds("loading", time.perf_counter() - started)
        for name, step in zip(
            STEPS, (measure_teacher, transfer, finetune, save, train_control, measure_student), strict=True
        ):
            step(run)
            if name == until:
                break
        run.count_seconds()
        if run.results.complete:
            on_main_process(accelerator, lambda: save_results(folder.model, run.results))
        # With no more seconds than there are in the model's folder.
        on_main_process(accelerator, lambda: folder.write_results(run.results))
    return folder


def _prepare(
    config: RunConfig,
    folder: RunFolder,
    accelerator: Accelerator,
    device: torch.device,
    console: Console | None,
    results: Results,
    started: float,
) -> Run:
    set_seed(config.seed)
    dtype = getattr(torch, results.dtype or "")
    model, tokenizer = load_model(config, dtype, device, accelerator)
    check_supported(model)  # before the text is read, which may take long
    choose_layers(list(attention_modules(model)), config.linearization.layers)
    shown = console if accelerator.is_main_process else None
    train_set, validation = build_datasets(
        config.data, tokenizer, config.seed, teacher=model, console=shown, others=config.evaluation.sources
    )
    data = TrainingData(train_set, validation, config.data.packing == "documents", tokenizer)
    for stage in (config.transfer, config.finetune):
        check_reading(stage, data, model, config.seed, accelerator.num_processes)
    segments = evaluation_segments(config, tokenizer, validation, vocabulary_size(model))
    notes = notes_on_data(config, len(train_set) * train_set.ids.shape[1], shown)
    trackers = trackers_of(config.report_to, folder.path, config.name, config.model_dump(mode="json"))
    reporter = Reporter(folder.metrics_file, console, enabled=accelerator.is_main_process, trackers=trackers)
    add_facts(results, config, device, segments, SAMPLE_PROMPT)
    results.data_notes = notes
    config = linearize_layers(model, config, start_batch(config, data), results, accelerator)
    results.memory = text_memory(model, dtype)
    check_model(model).require()  # before hours go into a family that lolcats misunderstands
    if config.finetune.enabled:
        check_lora(model, config.finetune)
        check_logits(config.finetune, model)
    started -= results.seconds.get("total") or 0.0
    run = Run(config, folder, accelerator, reporter, console, model, tokenizer, data, segments, results, started)
    run.say(
        f"{type(model).__name__}: {len(linearized_layers(model))} of {model.config.num_hidden_layers} layers "
        f"linearized, {len(train_set):,} training sequences of {train_set.ids.shape[1]:,} tokens, "
        f"{results.device}, {results.dtype}"
    )
    if config.finetune.sharding.enabled and not is_sharded(model):
        run.say("finetune.sharding: one process has nothing to share, so its weights stay whole")
    if accelerator.is_main_process and (unknown := folder.unknown_settings()):
        run.say(f"{folder.config_file} has settings of a later version, which are ignored: {', '.join(unknown)}")
    return run


def measure_teacher(run: Run) -> None:
    """Teacher and training-free control, before anything is trained.

    Raises:
        LolcatsError: the teacher's loss is not finite, so nothing could be learned from it.
    """
    if "teacher" in run.results.perplexity:
        return
    variants = teacher_variants(run.model, controls=run.config.evaluation.controls)
    scores = record(run, variants, variants["teacher"])
    if "teacher" not in scores:
        raise LolcatsError(f"the teacher cannot be measured: {run.results.notes[measuring('teacher')]}")
    if not math.isfinite(scores["teacher"].loss):
        raise LolcatsError(
            f"the loss of the teacher {run.config.model} is {scores['teacher'].loss} on the text to be measured, so "
            "nothing can be learned from it; look at its weights, or try dtype=float32 and other text"
        )
    with attention_mode(run.model, "softmax"):
        _sample(run, "teacher")
    run.write_results()


def transfer(run: Run) -> None:
    """Stage 1."""
    config = run.config.transfer
    if not config.enabled:
        return
    if not any(layer.mixer.learns for layer in linearized_layers(run.model)):
        run.results.notes["transfer"] = "these layers have nothing to learn by themselves, so there is no first stage"
        run.say(f"transfer: {run.results.notes['transfer']}")
        run.write_results()
        return
    run.use_compiled(config.compile)
    stage = TransferStage(run.model, config)
    train_stage(run, stage, config)
    run.model.requires_grad_(False)
    if config.compared == "far" and run.config.linearization.starts_from_text:
        # The linear half was trained by itself, which leaves its share beside the window open.
        start_from_text(run.model, linearized_layers(run.model), torch.from_numpy(run.data.train.ids[:4]).long())
    if "transfer" not in run.results.perplexity:
        record(run, {"transfer": student_variants(run.model, [])["student"]}, teacher_variants(run.model)["teacher"])
        run.write_results()


def finetune(run: Run) -> None:
    """Stage 2."""
    config = run.config.finetune
    added = added_tensors(run.model)
    on_main_process(run.accelerator, lambda: save_added(run.folder, added))
    run.widened = _slow_backward(run)
    if config.enabled:
        if run.widened:
            cast_weights(run.model, torch.float32)
        set_seed(run.config.seed)  # the adapters' start must not depend on whether stage 1 was resumed
        run.stage = FinetuneStage(run.model, config)
        train_stage(run, run.stage, config)
    run.use_compiled(False)


def measure_student(run: Run) -> None:
    """The student and its controls, once the artefact is saved."""
    teacher: list[Variant] = []
    run.attempt("loading the teacher again", lambda: teacher.append(teacher_of(run, run.stage)))
    record(run, student_variants(run.model, run.config.evaluation.controls), teacher[0] if teacher else None)
    # The artefact has its adapters merged into weights of lower precision: its own number is the one to report.
    for name, score in run.saved.items():
        run.results.store(name, score)
    run.results.complete = True


def save(run: Run) -> None:
    """Save the artefact, sample from it, and measure it, where it can differ from what was trained."""
    stage = run.stage
    if is_sharded(run.model):
        with save_sharded(run):
            _measure_saved(run)
        return
    adapter = None if stage is None else stage.adapter
    with unchanged(adapter or run.model):
        if run.config.quantization != "none":
            unpack(run.model, stage, run.dtype)
        if stage is not None and (own := stage.finish()) is not None:
            on_main_process(run.accelerator, lambda: save_adapter(run.folder.adapter, own))
            own.merge_and_unload()
        if run.widened:
            cast_weights(run.model, torch.bfloat16)
        artefact = (run.folder.model, run.model, run.tokenizer, run.config, run.results)
        on_main_process(run.accelerator, lambda: save_artefact(*artefact))
        run.write_results()
        _measure_saved(run)
    if stage is not None:
        stage.adapter = adapter


def _measure_saved(run: Run) -> None:
    """What the artefact scores and writes, if something was trained beside it."""
    if run.stage is not None:
        student = {"student": student_variants(run.model, [])["student"]}
        run.saved = record(run, student, None, note=" (as saved, which is reported)")
    _sample(run, "student")


def _sample(run: Run, name: str) -> None:
    """What the model, as it is now, writes after the prompt."""
    run.results.generation.pop(name, None)
    text: list[str] = []
    run.attempt(f"sample of the {name}", lambda: text.append(sample(run.model, run.tokenizer, SAMPLE_PROMPT)))
    if text:
        run.results.generation[name] = text[0]


def _slow_backward(run: Run) -> bool:
    """Whether stage 2 is better done in float32: CPUs run bfloat16 forward twice as fast, but backward far slower."""
    if run.config.quantization != "none" or is_sharded(run.model):
        return False
    return run.config.dtype == "auto" and run.accelerator.device.type == "cpu" and run.results.dtype == "bfloat16"
