"""Recall of a model in all its modes: tasks x lengths x variants, kept cell by cell so that it can be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.config.variants import short_label
from lolcats.errors import LolcatsError
from lolcats.evaluation.perplexity import Variant
from lolcats.evaluation.recall.answers import answer
from lolcats.evaluation.recall.haystack import essay
from lolcats.evaluation.recall.needles import Prompt
from lolcats.evaluation.recall.progress import Cell, Progress
from lolcats.evaluation.recall.tasks import TASKS, check_tasks, depth_range, make_prompts
from lolcats.models.context import check_context, context_limit, ends_there


@dataclass
class RecallSettings:
    """What is asked; equal settings give equal prompts."""

    tasks: list[str] = field(default_factory=lambda: ["passkey"])
    lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048])
    """Tokens of a prompt together with the room for its answer."""
    samples: int = 20
    """Prompts a task and length."""
    depths: int = 10
    """Equal ranges of depth over which the prompts are spread."""
    seed: int = 0
    haystack: str = "python-docs"
    """Source of prose for the tasks that hide needles in prose."""
    beyond_context: bool = False
    """Ask for more text than the model was made for."""


def recall(
    variants: Mapping[str, Variant],
    tokenizer: PreTrainedTokenizerBase | None,
    settings: RecallSettings,
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Cell]:
    """Let every variant answer the same prompts, by generation.

    Args:
        variants: see `lolcats.config.variants`; modes of one model and its teacher.
        tokenizer: theirs.
        settings: tasks, lengths and samples.
        batch_size: prompts at once.
        progress: cells that are known already, and where new ones are kept.
        report: called before each cell with (its name, cells done, all cells).

    Raises:
        LolcatsError: an unknown task, no tokenizer, a length without room for its task or beyond the model's context.
    """
    tasks = check_recall(settings, next(iter(variants.values())).model, tokenizer)
    assert tokenizer is not None
    progress = Progress(None, {}) if progress is None else progress
    columns = [(task, length) for task in tasks for length in sorted(set(settings.lengths))]
    known = progress.cells
    done = 0
    for task, length in sorted(columns, key=lambda column: column[1]):  # short texts first: something to see soon
        missing = [name for name in variants if (name, task, length) not in known]
        prompts = _prompts(settings, task, length, tokenizer) if missing else []
        for name in variants:
            report(f"{short_label(name)}, {task}, {length:,} tokens", done, len(columns) * len(variants))
            if name in missing:
                score = _ask(variants[name], tokenizer, task, prompts, settings.depths, batch_size)
                progress.add(Cell(name, task, length, **score))
            done += 1
    return [known[name, task, length] for task, length in columns for name in variants]


def check_recall(
    settings: RecallSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> list[str]:
    """The tasks, once all is known to be possible: no evaluation shall fail after hours.

    Raises:
        LolcatsError: as `recall`.
    """
    tasks = check_tasks(settings.tasks)
    if tokenizer is None:
        raise LolcatsError("the model has no tokenizer, which recall tasks need; save one into its folder")
    check_context(model, max(settings.lengths), "a prompt", beyond=settings.beyond_context)
    for task in tasks:
        for prompt in _prompts(settings, task, min(settings.lengths), tokenizer, samples=1):
            _check_vocabulary(prompt, model)
    return tasks


def check_haystack(settings: RecallSettings) -> None:
    """Read the prose, if a task asks for it: it can be found wrong without the model.

    Raises:
        DataError: see `essay`.
    """
    if any(TASKS[task].prose for task in check_tasks(settings.tasks)):
        essay(settings.haystack)


def _check_vocabulary(prompt: Prompt, model: PreTrainedModel) -> None:
    if (highest := max(prompt.ids)) >= (size := model.get_input_embeddings().weight.shape[0]):  # type: ignore[arg-type]
        raise LolcatsError(f"the tokenizer gives token {highest} and the model has {size}; it is another model's")


def _prompts(
    settings: RecallSettings, task: str, length: int, tokenizer: PreTrainedTokenizerBase, samples: int | None = None
) -> list[Prompt]:
    prose = essay(settings.haystack) if TASKS[task].prose else ()
    return make_prompts(
        task,
        tokenizer,
        length,
        samples=settings.samples if samples is None else samples,
        depths=settings.depths,
        seed=settings.seed,
        essay=prose,
    )


def _ask(
    variant: Variant,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    prompts: list[Prompt],
    depths: int,
    batch_size: int,
) -> dict[str, Any]:
    """What a `Cell` says of the answers."""
    how, new_tokens = TASKS[task], TASKS[task].new_tokens
    limit = context_limit(variant.model)
    if limit is not None and ends_there(variant.model):
        new_tokens = min(new_tokens, limit - max(len(prompt.ids) for prompt in prompts))
    texts = answer(variant, tokenizer, prompts, new_tokens=new_tokens, settled=how.settled, batch_size=batch_size)
    scores = [how.score(text, prompt.answers) for text, prompt in zip(texts, prompts, strict=True)]
    rows = [
        {"tokens": len(p.ids), "depths": list(p.depths), "answers": list(p.answers), "output": text, "score": score}
        for p, text, score in zip(prompts, texts, scores, strict=True)
    ]
    by_depth = list(_by_depth(scores, depths)) if how.by_depth else []
    return {"score": sum(scores) / len(scores), "by_depth": by_depth, "samples": rows}


def _by_depth(scores: list[float], depths: int) -> Iterator[float | None]:
    for number in range(depths):
        part = [score for index, score in enumerate(scores) if depth_range(index, len(scores), depths) == number]
        yield sum(part) / len(part) if part else None
