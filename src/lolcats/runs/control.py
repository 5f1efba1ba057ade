"""The control that is trained: a plain window of the student's memory gets the teacher's weights and stage 2.

Tokens, their order, settings and seed are those of stage 2; there is no stage 1, because a window has nothing to learn
by itself. It costs as much as stage 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from lolcats.evaluation.trained_window import save_window, window_folder
from lolcats.evaluation.variants import window_variants
from lolcats.modeling import convert, linearized_layers
from lolcats.modeling.hf import cast_weights
from lolcats.runs.artefact import unchanged
from lolcats.runs.loading import load_model
from lolcats.runs.parts import record, teacher_of, train_stage
from lolcats.runs.state import Run, start_batch
from lolcats.training.parallel import on_main_process
from lolcats.training.window_control import WindowStage
from lolcats.variants import TRAINED_WINDOW

FAILED = "training of trained_window"
"""Name of the note where it failed: the student is worth more than its control."""


def train_control(run: Run) -> None:
    """Train the window, save it beside the student, and measure it."""
    if run.config.trains_window:
        run.say(f"{TRAINED_WINDOW}: a plain window of the same memory gets stage 2 too, which takes as long once more")
        if run.accelerator.num_processes == 1:
            run.attempt(FAILED, lambda: _train_window(run))
        else:  # one that goes on alone would leave the others waiting for it
            _train_window(run)
        run.write_results()


def _train_window(run: Run) -> None:
    with _before_stage_2(run) as model:
        for layer in linearized_layers(model):
            layer.memory_dtype = run.dtype
        set_seed(run.config.seed)  # as before stage 2
        stage = WindowStage(model, run.config.finetune)
        train_stage(run, stage, run.config.finetune)
        on_main_process(run.accelerator, lambda: save_window(window_folder(run.folder.model), stage))
        if TRAINED_WINDOW not in run.results.perplexity:
            record(run, window_variants(model, [TRAINED_WINDOW], nullcontext), teacher_of(run, stage))


@contextmanager
def _before_stage_2(run: Run) -> Iterator[PreTrainedModel]:
    """The converted teacher: the run's model without its LoRA, which comes back at the end, or loaded anew."""
    stage = run.stage
    if stage is None or stage.adapter is None:
        yield _converted_anew(run)
        return
    with unchanged(stage.adapter, merging=False):
        yield stage.adapter.unload()


def _converted_anew(run: Run) -> PreTrainedModel:
    model, _ = load_model(run.config, run.dtype, run.accelerator.device, run.accelerator)
    convert(model, run.config.linearization, input_ids=start_batch(run.config, run.data))
    if run.widened:
        cast_weights(model, torch.float32)
    return model
