"""What teacher and student write after the same prompts, and where they part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lolcats.evaluation.analysis.file import Generation
from lolcats.evaluation.analysis.kept import token_texts
from lolcats.evaluation.perplexity import Variant
from lolcats.models.generation import encode, with_room, write_tokens

PROMPTS = (
    "The most important thing to know about computers is",
    "Once upon a time, in a small town by the sea,",
    "The capital of France is",
)
"""Where no others are given."""


def write_both(
    teacher: Variant,
    student: Variant,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    progress: Callable[[], None] | None = None,
) -> list[Generation]:
    """The likeliest tokens after each prompt.

    Args:
        teacher, student: who writes.
        tokenizer: of both.
        prompts: texts to continue.
        new_tokens: how many tokens at most, and no more than a table of positions has room for.
        progress: called after each prompt.

    Raises:
        LolcatsError: what `encode` and `write_tokens` raise.
    """
    found = []
    for prompt in prompts:
        ids = encode(tokenizer, prompt)
        written = (_written(variant, tokenizer, ids, new_tokens) for variant in (teacher, student))
        found.append(_generation(prompt, tokenizer, *written))
        if progress is not None:
            progress()
    return found


def _written(variant: Variant, tokenizer: PreTrainedTokenizerBase, ids: Tensor, new_tokens: int) -> Tensor:
    """The tokens after ids [1, N]."""
    with variant.mode():
        count = with_room(variant.model, ids, new_tokens)
        return write_tokens(variant.model, tokenizer, ids, max_new_tokens=count)[0, ids.shape[1] :]


def _generation(prompt: str, tokenizer: PreTrainedTokenizerBase, teacher: Tensor, student: Tensor) -> Generation:
    texts = [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in (teacher, student)]
    return Generation(
        prompt=prompt,
        teacher=texts[0],
        student=texts[1],
        first_difference=first_difference(teacher.tolist(), student.tolist()),
        tokens_teacher=token_texts(tokenizer, teacher),
        tokens_student=token_texts(tokenizer, student),
    )


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Number of the first token that differs, or that only one of them has; None where they are the same."""
    return next((n for n, (a, b) in enumerate(zip_longest(one, other)) if a != b), None)
