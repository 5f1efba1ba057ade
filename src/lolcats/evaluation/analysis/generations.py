"""What teacher and student write after the same prompts, and where they part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

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
        written = []
        for variant in (teacher, student):
            with variant.mode():
                count = with_room(variant.model, ids, new_tokens)
                written.append(write_tokens(variant.model, tokenizer, ids, max_new_tokens=count)[0, ids.shape[1] :])
        texts = [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in written]
        tokens = [token_texts(tokenizer, tokens) for tokens in written]
        found.append(
            Generation(
                prompt=prompt,
                teacher=texts[0],
                student=texts[1],
                first_difference=first_difference(*(tokens.tolist() for tokens in written)),
                tokens_teacher=tokens[0],
                tokens_student=tokens[1],
            )
        )
        if progress is not None:
            progress()
    return found


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Number of the first token that differs, or that only one of them has; None where they are the same."""
    return next((n for n, (a, b) in enumerate(zip_longest(one, other)) if a != b), None)
