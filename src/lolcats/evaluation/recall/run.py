"""Recall of a model in all its modes: tasks x lengths x variants, kept cell by cell so that it can be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from lolcats.errors import LolcatsError
from lolcats.evaluation.perplexity import Variant
from lolcats.evaluation.recall.haystack import essay
from lolcats.evaluation.recall.needles import Prompt
from lolcats.evaluation.recall.tasks import TASKS, check_tasks, depth_range, make_prompts
from lolcats.evaluation.store import AnswerStore
from lolcats.evaluation.variants import identities
from lolcats.identity import key_of
from lolcats.models.context import check_context, context_limit, ends_there
from lolcats.models.generation import own_settings
from lolcats.models.vocabulary import check_token_ids
from lolcats.placing import main_device
from lolcats.variants import short_label

Settled = Callable[[str, Sequence[str]], bool]


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


@dataclass
class Cell:
    """What one variant scores at one task and length."""

    variant: str
    task: str
    length: int
    score: float
    """Mean of the samples, 0 to 1."""
    by_depth: list[float | None]
    """Means of the ranges of depth, None where a range has no sample; empty for tasks with many needles."""
    samples: list[dict[str, Any]]
    """Prompt tokens, depths, answers, output and score of each prompt."""


def recall(
    variants: Mapping[str, Variant],
    tokenizer: PreTrainedTokenizerBase | None,
    settings: RecallSettings,
    *,
    batch_size: int = 4,
    store: AnswerStore | None = None,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Cell]:
    """Let every variant answer the same prompts, by generation.

    Args:
        variants: see `lolcats.variants`; modes of one model and its teacher.
        tokenizer: theirs.
        settings: tasks, lengths and samples.
        batch_size: prompts at once.
        store: cells that are known already, and where new ones are kept.
        report: called before each cell with (its name, cells done, all cells).

    Raises:
        LolcatsError: an unknown task, no tokenizer, a length without room for its task or beyond the model's context.
    """
    tasks = check_recall(settings, next(iter(variants.values())).model, tokenizer)
    assert tokenizer is not None
    store = store or AnswerStore()
    known = identities(variants, tokenizer)
    columns = [(task, length) for task in tasks for length in sorted(set(settings.lengths))]
    cells: dict[tuple[str, str, int], Cell] = {}
    for task, length in sorted(columns, key=lambda column: column[1]):  # short texts first: something to see soon
        prompts = _prompts(settings, task, length, tokenizer, settings.samples)
        asked = key_of([[prompt.ids, prompt.answers] for prompt in prompts], settings.depths)
        for name, variant in variants.items():
            report(f"{short_label(name)}, {task}, {length:,} tokens", len(cells), len(columns) * len(variants))
            key = key_of("recall", known[name], name, task, asked)
            if (found := store.get(key)) is None:
                found = _ask(variant, tokenizer, task, prompts, settings.depths, batch_size)
                store.put(key, found)
            cells[name, task, length] = Cell(name, task, length, **found)
    return [cells[name, task, length] for task, length in columns for name in variants]


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
        (prompt,) = _prompts(settings, task, min(settings.lengths), tokenizer, samples=1)
        if (highest := max(prompt.ids)) >= (size := model.get_input_embeddings().weight.shape[0]):  # type: ignore
            raise LolcatsError(f"the tokenizer gives token {highest} and the model has {size}; it is another model's")
    return tasks


def check_haystack(settings: RecallSettings) -> None:
    """Read the prose, if a task asks for it: it can be found wrong without the model.

    Raises:
        DataError: see `essay`.
    """
    if any(TASKS[task].prose for task in check_tasks(settings.tasks)):
        essay(settings.haystack)


def _prompts(
    settings: RecallSettings, task: str, length: int, tokenizer: PreTrainedTokenizerBase, samples: int
) -> list[Prompt]:
    how = {"samples": samples, "depths": settings.depths, "seed": settings.seed}
    prose = essay(settings.haystack) if TASKS[task].prose else ()
    return make_prompts(task, tokenizer, length, essay=prose, **how)


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


@dataclass
class _Settled(StoppingCriteria):
    """Ends a row as soon as its score can no longer change: the tokens that follow would be thrown away."""

    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]
    width: int
    settled: Settled

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        done = [self.settled(text, prompt.answers) for text, prompt in zip(texts, self.prompts, strict=True)]
        return torch.tensor(done, device=input_ids.device)


@torch.no_grad()
def answer(
    variant: Variant,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    new_tokens: int,
    settled: Settled,
    batch_size: int = 4,
) -> list[str]:
    """What the model writes after each prompt, always the likeliest token.

    Prompts of one length share a batch without padding where there are enough of them; else shorter ones are padded
    at the left.

    Args:
        variant: the model in its mode.
        tokenizer: writes text.
        prompts: in any order.
        new_tokens: most tokens of an answer.
        settled: whether an answer may end; see `RecallTask`.
        batch_size: prompts at once.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids), reverse=True)
    texts = [""] * len(prompts)
    for begin in range(0, len(order), batch_size):
        rows = order[begin : begin + batch_size]
        batch = [prompts[row] for row in rows]
        with variant.mode():
            written = _write(variant.model, tokenizer, batch, new_tokens, settled)
        for row, text in zip(rows, written, strict=True):
            texts[row] = text
    return texts


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Prompt],
    new_tokens: int,
    settled: Settled,
) -> list[str]:
    filler = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if isinstance(i, int)), 0)
    width = max(len(prompt.ids) for prompt in batch)
    missing = [width - len(prompt.ids) for prompt in batch]
    ids = torch.tensor([[filler] * n + prompt.ids for n, prompt in zip(missing, batch, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in missing])
    check_token_ids(ids, model, "the prompt")
    # A penalty for repetition, which a model's own settings may ask for, would punish the right answer.
    with own_settings(model, tokenizer, {}):
        written = cast(Any, model).generate(
            ids.to(main_device(model)),
            attention_mask=mask.to(main_device(model)),
            max_new_tokens=new_tokens,
            pad_token_id=filler,
            stopping_criteria=StoppingCriteriaList([_Settled(tokenizer, batch, width, settled)]),
        )
    return tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
