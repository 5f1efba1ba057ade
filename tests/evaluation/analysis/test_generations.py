"""What both models write, and where they part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lolcats.errors import LolcatsError
from lolcats.evaluation.analysis.generations import first_difference, write_both
from lolcats.evaluation.variants import student_variants, teacher_variants
from lolcats.modeling import attention_mode
from lolcats.models.generation import sample


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2 == first_difference([1, 2, 3], [1, 2])
    assert first_difference([], []) is None


def test_side_by_side(
    make_teacher: Callable[..., PreTrainedModel], make_student: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    """Greedy, each in its own mode; as `sample` writes them."""
    model = make_student(make_teacher(vocab_size=len(tiny_tokenizer)), window=2)
    prompts, calls = ["The river", "a mill still turns"], []
    both = teacher_variants(model)["teacher"], student_variants(model, [])["student"]
    found = write_both(*both, tiny_tokenizer, prompts, 9, lambda: calls.append(1))
    assert [row.prompt for row in found] == prompts and len(calls) == 2
    for row in found:
        assert row.student == sample(model, tiny_tokenizer, row.prompt, 9)
        with attention_mode(model, "softmax"):
            assert row.teacher == sample(model, tiny_tokenizer, row.prompt, 9)
        assert len(row.tokens_teacher) == len(row.tokens_student) == 9
        place = row.first_difference
        assert place is not None and row.tokens_teacher[:place] == row.tokens_student[:place]
    same = write_both(both[0], both[0], tiny_tokenizer, prompts[:1], 9)
    assert same[0].first_difference is None and same[0].tokens_teacher == same[0].tokens_student


def test_what_cannot_be_continued(
    make_teacher: Callable[..., PreTrainedModel], make_student: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    model = make_student(make_teacher(vocab_size=len(tiny_tokenizer)), window=2)
    variant = student_variants(model, [])["student"]
    with pytest.raises(LolcatsError, match="no token of the text"):
        write_both(variant, variant, tiny_tokenizer, [""], 3)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(LolcatsError, match="NaN or infinite"):
        write_both(variant, variant, tiny_tokenizer, ["The river"], 3)
