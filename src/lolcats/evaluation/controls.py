"""The controls that a claim about a linearized model must pass (arXiv 2510.05901).

| name          | what it is                                                                      |
|---------------|---------------------------------------------------------------------------------|
| teacher       | the pretrained model: softmax over all tokens                                    |
| training_free | the teacher's weights with softmax over window and sinks alone; nothing trained  |
| student       | the linearized model                                                             |
| window_only   | the student without its linear half: what the window and the fine-tuning do alone |
| linear_only   | the student without its softmax half: what the linear half does alone            |
| no_attention  | the student with attention outputs of zero                                       |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from transformers import PreTrainedModel

from lolcats.evaluation.perplexity import Variant
from lolcats.modeling import attention_mode

STUDENT_MODES: dict[str, str] = {
    "student": "full",
    "window_only": "window_only",
    "linear_only": "linear_only",
    "no_attention": "no_attention",
}


def student_variants(model: PreTrainedModel, controls: list[str]) -> dict[str, Variant]:
    """The student and those of `controls` that are modes of it."""
    return {
        name: Variant(model, _mode(model, mode))
        for name, mode in STUDENT_MODES.items()
        if name == "student" or name in controls
    }


def teacher_variants(
    model: PreTrainedModel, plain: Callable[[], AbstractContextManager[object]] = nullcontext
) -> dict[str, Variant]:
    """Teacher and training-free control, from a converted model whose own weights are the teacher's inside `plain()`.

    Args:
        model: the converted model.
        plain: context that switches adapters off, where there are any.
    """
    return {
        "teacher": Variant(model, _mode(model, "softmax", plain)),
        "training_free": Variant(model, _mode(model, "window_only", plain)),
    }


def _mode(
    model: PreTrainedModel, mode: str, plain: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Callable[[], AbstractContextManager[object]]:
    @contextmanager
    def enter() -> Iterator[None]:
        with plain(), attention_mode(model, mode):
            yield

    return enter
