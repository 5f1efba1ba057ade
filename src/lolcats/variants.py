"""The variants of a model: what is measured beside a student, so that a claim about it can be believed.

The controls are those of arXiv 2510.05901. Every list of variants in the package, from settings to tables, is read from
`VARIANTS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from lolcats.printable import show_number

Weights = Literal["teacher", "student", "stage 1", "window"]
TRAINED_WINDOW = "trained_window"
"""The one control that is trained, as a step of its own; its stage and its folder are called so too."""
EQUAL_WINDOW, NEAR_ONLY, WINDOW_ONLY = "equal_window", "near_only", "window_only"
"""Controls by which a part of a layer is judged."""


class VariantInfo(NamedTuple):
    """One row of the table."""

    name: str
    label: str
    """For people; {student} is what the student is called there."""
    mode: str
    """Of the linearized layers while it is measured."""
    weights: Weights
    """Whose weights run: the teacher's, the student's, those that stage 1 left, or those of a trained window."""
    is_control: bool = False


VARIANTS = (
    VariantInfo("teacher", "teacher (softmax)", "softmax", "teacher"),
    VariantInfo("training_free", "window + sinks, nothing trained", "window_only", "teacher", True),
    VariantInfo(EQUAL_WINDOW, "window of the same memory, nothing trained", "equal_window", "teacher", True),
    VariantInfo(TRAINED_WINDOW, "window of the same memory, trained", "equal_window", "window", True),
    VariantInfo("transfer", "after attention transfer", "full", "stage 1"),
    VariantInfo("student", "{student}", "full", "student"),
    VariantInfo(NEAR_ONLY, "{student} without its far half", "near_only", "student", True),
    VariantInfo(WINDOW_ONLY, "{student}, window and sinks alone", "window_only", "student", True),
    VariantInfo("linear_only", "{student} without its softmax half", "linear_only", "student", True),
    VariantInfo("no_attention", "{student} without attention", "no_attention", "student", True),
)
"""In the order of the story, in which tables show them."""
NAMES = tuple(variant.name for variant in VARIANTS)
_controls = [variant for variant in VARIANTS if variant.is_control]
CONTROLS = tuple(variant.name for variant in sorted(_controls, key=lambda variant: variant.weights != "student"))
"""Names of the controls: modes of the student, then what needs the teacher."""
TEACHER_CONTROLS = tuple(variant.name for variant in _controls if variant.weights == "teacher")


def ordered(names: Iterable[str]) -> list[str]:
    """Names in the order of `VARIANTS`, others last."""
    return sorted(names, key=lambda name: NAMES.index(name) if name in NAMES else len(NAMES))


def score_cells(
    perplexity: Mapping[str, float | None], kl: Mapping[str, float | None]
) -> Iterator[tuple[str, list[str]]]:
    """Each variant with its perplexity, the ratio to the teacher's, and the distance from the teacher, for people."""
    teacher = perplexity.get("teacher")
    for name in ordered(perplexity):
        value, distance = perplexity[name], None if name == "teacher" else kl.get(name)
        ratio = value / teacher if value is not None and teacher else None
        yield name, [show_number(value), show_number(ratio, 3), show_number(distance, 4)]


def label(name: str, student: str = "student") -> str:
    """What people call a variant; one that is not in the table is called by its name."""
    for variant in VARIANTS:
        if variant.name == name:
            return variant.label.format(student=student)
    return name


def short_label(name: str) -> str:
    """The same for a column that has little room."""
    return "after transfer" if name == "transfer" else name.replace("_", " ")
