"""What was kept: perplexity by position, distance from the teacher, and the controls."""

from lolcats.evaluation.compare import compare
from lolcats.evaluation.perplexity import (
    Measurement,
    Variant,
    as_segments,
    evaluation_segments,
    measure,
)
from lolcats.evaluation.variants import student_variants, teacher_variants

__all__ = [
    "Measurement",
    "Variant",
    "as_segments",
    "compare",
    "evaluation_segments",
    "measure",
    "student_variants",
    "teacher_variants",
]
