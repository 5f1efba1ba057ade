"""The maps of attention of an analysis, as a page shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lolcats.errors import LolcatsError
from lolcats.evaluation.analysis.maps import read_maps
from lolcats.report.charts.attention import TextMaps
from lolcats.report.subject import Subject


def text_maps(subjects: Sequence[Subject]) -> Iterator[TextMaps]:
    """The maps of all runs that have some; what cannot be read is a note of its run."""
    several = len(subjects) > 1
    for subject in subjects:
        section = None if subject.analysis is None else subject.analysis.attention
        if section is None:
            continue
        try:
            found = read_maps(subject.place, section)
        except LolcatsError as error:
            subject.notes.append(str(error))
            continue
        for text, maps in zip(section.texts, found, strict=True):
            label = f"{subject.name}: {text.name}" if several else text.name
            yield TextMaps(label, text.tokens, section.layers, section.heads, maps.teacher, maps.student)
