"""The variants of `lolcats.variants` as models that can be measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.evaluation.perplexity import Variant
from lolcats.identity import model_identity
from lolcats.modeling import attention_mode, linearized_layers
from lolcats.modeling.attention import COMMON_MODES
from lolcats.variants import TEACHER_CONTROLS, VARIANTS

Enter = Callable[[], AbstractContextManager[object]]


def student_variants(model: PreTrainedModel, controls: Collection[str]) -> dict[str, Variant]:
    """The student and those of `controls` that are modes of all its mixers."""
    return _variants(model, "student", controls, nullcontext)


def teacher_variants(
    model: PreTrainedModel, plain: Enter = nullcontext, controls: Collection[str] = TEACHER_CONTROLS
) -> dict[str, Variant]:
    """The teacher and those of `controls` that are modes of all its mixers.

    Args:
        model: a converted model whose own weights are the teacher's inside `plain()`.
        plain: context that switches adapters off, where there are any.
        controls: names of controls.
    """
    return _variants(model, "teacher", controls, plain)


def _variants(
    model: PreTrainedModel, weights: Literal["teacher", "student"], controls: Collection[str], plain: Enter
) -> dict[str, Variant]:
    possible = [
        (*COMMON_MODES, *layer.mixer.modes) for layer in linearized_layers(model)
    ]  # a mixer may have other halves, or none
    return {
        row.name: Variant(model, _mode(model, row.mode, plain))
        for row in VARIANTS
        if row.weights == weights
        and (not row.is_control or (row.name in controls and all(row.mode in modes for modes in possible)))
    }


def _mode(model: PreTrainedModel, mode: str, plain: Enter) -> Enter:
    @contextmanager
    def enter() -> Iterator[None]:
        with plain(), attention_mode(model, mode):
            yield

    return enter


def identities(variants: Mapping[str, Variant], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Variant -> `model_identity` of its model, which is taken once for all variants of a model."""
    known: dict[PreTrainedModel, str] = {}
    for variant in variants.values():
        if variant.model not in known:
            known[variant.model] = model_identity(variant.model, tokenizer)
    return {name: known[variant.model] for name, variant in variants.items()}
