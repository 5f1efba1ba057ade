"""What several steps of the recipe do: train a stage, find its teacher, measure."""

from __future__ import annotations

from typing import Any

import torch

from lolcats.evaluation import Measurement, Variant, measure, teacher_variants
from lolcats.models.sharded import is_sharded
from lolcats.runs.loading import load_model
from lolcats.runs.results import Best
from lolcats.runs.state import Run, timed
from lolcats.training import FinetuneStage, Stage, TrainResult, train


def train_stage(run: Run, stage: Stage, config: Any) -> TrainResult:
    if config.varies_window:
        run.use_compiled(False)  # a program would be made for each window
    autocast = torch.bfloat16 if next(run.model.parameters()).dtype == torch.bfloat16 else None
    result = train(
        stage, config, run.data, run.folder.checkpoints(stage.name), run.reporter, accelerator=run.accelerator,
        seed=run.config.seed, autocast=autocast, sharded=is_sharded(run.model),
    )  # fmt: skip
    run.results.tokens[stage.name] = result.tokens
    run.results.tokens_per_second[stage.name] = round(result.tokens_per_second, 1)
    run.results.seconds[stage.name] = round(result.seconds, 2)
    run.results.best[stage.name] = Best(step=result.best_step, loss=result.best_loss)
    if result.changes:
        run.results.changes[stage.name] = result.changes
    run.say(
        f"{stage.name}: {result.tokens:,} tokens in {result.seconds:,.0f} s "
        f"({result.tokens_per_second:,.0f} tokens/s), "
        f"best validation loss {result.best_loss:.4g} at step {result.best_step} of {result.steps}"
    )
    return result


@timed("measuring")
def record(run: Run, variants: dict[str, Variant], teacher: Variant | None, note: str = "") -> dict[str, Measurement]:
    """Measure and put the numbers into the results; without a teacher, no distance from it.

    Returns:
        The scores of the variants that could be measured.
    """
    e = run.config.evaluation
    options: dict[str, Any] = {"teacher": teacher, "last": e.last, "batch_size": e.batch_size}
    scores: dict[str, Measurement] = {}
    run.results.forget_notes([measuring(name, note) for name in variants])
    try:
        scores = measure(variants, run.segments, **options)
    except Exception:  # one of them; the others are measured one by one
        for name, variant in variants.items():
            one = {name: variant}
            run.attempt(measuring(name, note), lambda one=one: scores.update(measure(one, run.segments, **options)))
    for name, score in scores.items():
        run.results.store(name, score)
        distance = "" if score.kl is None or name == "teacher" else f", KL to the teacher {score.kl:.4f}"
        run.say(f"{name:<14} perplexity {score.perplexity:.2f}{distance}{note}")
    return scores


def measuring(name: str, note: str = "") -> str:
    return f"measurement of {name}{note}"


def teacher_of(run: Run, stage: FinetuneStage | None) -> Variant:
    """The teacher of what a stage has trained: the same weights without adapters, or loaded anew where they changed."""
    if stage is None:
        return teacher_variants(run.model)["teacher"]
    if stage.adapter is not None:
        return teacher_variants(stage.model, stage.adapter.disable_adapter)["teacher"]
    if stage.teacher is not None:
        return teacher_variants(stage.teacher)["teacher"]
    return Variant(load_model(run.config, run.dtype, run.model.device, run.accelerator)[0])
