"""What teacher and student wrote after the same prompts, parted at the first token that differs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from lolcats.report.subject import Subject


class Side(NamedTuple):
    """What one of them wrote."""

    who: str
    same: str
    """Up to the difference."""
    first: str
    """The first token, or word, that differs."""
    rest: str


@dataclass
class Comparison:
    """One prompt."""

    run: str
    prompt: str
    sides: list[Side]
    unit: str
    """What was compared: "token", or "word" where the tokens are not known."""

    @property
    def same(self) -> bool:
        """Whether both wrote the same."""
        return not any(side.first for side in self.sides)


def comparisons(subjects: Sequence[Subject]) -> Iterator[Comparison]:
    """Those of the analysis, or the one that a run has made at its end."""
    for subject in subjects:
        found = (subject.analysis and subject.analysis.generations) or []
        for one in found:
            yield _compared(subject.name, one.prompt, one.tokens_teacher, one.tokens_student, "token")
        own = subject.results.generation
        if not found and {"prompt", "teacher", "student"} <= own.keys():
            teacher, student = (re.findall(r"\s*\S+|\s+$", own[name]) for name in ("teacher", "student"))
            yield _compared(subject.name, own["prompt"], teacher, student, "word")


def _compared(run: str, prompt: str, teacher: Sequence[str], student: Sequence[str], unit: str) -> Comparison:
    pairs = enumerate(zip_longest(teacher, student))
    at = next((number for number, (one, other) in pairs if one != other), max(len(teacher), len(student)))
    sides = [
        Side(who, "".join(words[:at]), "".join(words[at : at + 1]), "".join(words[at + 1 :]))
        for who, words in (("teacher", teacher), ("student", student))
    ]
    return Comparison(run, prompt, sides, unit)
