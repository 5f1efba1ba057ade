"""The variants of `lolcats.variants` as models that can be measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.evaluation.perplexity import Variant
from lolcats.identity import model_identity
from lolcats.modeling import attention_mode, linearized_layers
from lolcats.modeling.attention import COMMON_MODES
from lolcats.variants import TEACHER_CONTROLS, VARIANTS, Weights

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


def window_variants(model: PreTrainedModel, controls: Collection[str], trained: Enter) -> dict[str, Variant]:
    """The trained window, where `controls` names it.

    Args:
        model: a converted model whose own weights are those of the trained window inside `trained()`.
        controls: names of controls.
        trained: context that puts these weights into it.
    """
    return _variants(model, "window", controls, trained)


def _variants(model: PreTrainedModel, weights: Weights, controls: Collection[str], inside: Enter) -> dict[str, Variant]:
    possible = [
        (*COMMON_MODES, *layer.mixer.modes) for layer in linearized_layers(model)
    ]  # a mixer may have other halves, or none
    return {
        row.name: Variant(model, _mode(model, row.mode, inside), own_weights=weights == "window")
        for row in VARIANTS
        if row.weights == weights
        and (not row.is_control or (row.name in controls and all(row.mode in modes for modes in possible)))
    }


def _mode(model: PreTrainedModel, mode: str, inside: Enter) -> Enter:
    @contextmanager
    def enter() -> Iterator[None]:
        with inside(), attention_mode(model, mode):
            yield

    return enter


def identities(variants: Mapping[str, Variant], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Variant -> `model_identity` of its model, which is taken once for all variants with the same weights."""
    known: dict[tuple[PreTrainedModel, bool], str] = {}
    for variant in variants.values():
        if (variant.model, variant.own_weights) not in known:
            with variant.mode():
                known[variant.model, variant.own_weights] = model_identity(variant.model, tokenizer)
    return {name: known[variant.model, variant.own_weights] for name, variant in variants.items()}
