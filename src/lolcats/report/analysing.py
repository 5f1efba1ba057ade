"""What a report computes itself: the analysis of models that have none yet, or other parts of it than they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from lolcats.errors import LolcatsError
from lolcats.evaluation.analysis import AnalysisSettings
from lolcats.report.subject import Subject
from lolcats.runs.analysis import SEGMENTS, analyse_folder

Show = Callable[[str, int, int | None], None]
MOST_NAME = 40
"""Characters of a text that has no name of its own."""


@dataclass(frozen=True)
class Wanted:
    """What is to be analysed; where anything is said, an analysis that is there already is made anew."""

    layers: Sequence[int] = ()
    """Indices of linearized layers; none is all."""
    texts: Sequence[str] = ()
    """Files of text, or texts, for the maps of attention; none is the first segment."""
    prompts: Sequence[str] = ()
    """For both models to continue; none is some of our own."""
    segments: int | None = None
    """Of the text, at most."""
    teacher: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    asked: bool = field(init=False, default=False)
    """Whether anything was said of what is computed."""

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "asked", bool(self.layers or self.texts or self.prompts or self.segments or self.teacher)
        )

    def settings(self) -> AnalysisSettings:
        """The same for `analyse`.

        Raises:
            LolcatsError: a file of text cannot be read.
        """
        chosen = replace(AnalysisSettings(), layers=list(self.layers) or None, texts=read_texts(self.texts))
        return replace(chosen, prompts=list(self.prompts)) if self.prompts else chosen


def add_analyses(subjects: Sequence[Subject], wanted: Wanted, show: Show) -> None:
    """Analyse the models that have no analysis, or all of them where something else is asked for.

    Args:
        subjects: of which those without a model are left as they are.
        wanted: how much.
        show: called with what is done and how many parts of how many are.

    Raises:
        LolcatsError: what was asked for cannot be computed. What cannot be computed unasked is a note of its subject.
    """
    settings = wanted.settings()
    for subject in subjects:
        if subject.model is None or (subject.analysis is not None and not wanted.asked):
            continue
        show(f"{subject.name}: loading the models", 0, None)
        try:
            subject.analysis = analyse_folder(
                subject.place,
                teacher=wanted.teacher,
                segments=wanted.segments or SEGMENTS,
                settings=settings,
                device=wanted.device,
                dtype=wanted.dtype,
                progress=partial(show, f"{subject.name}: analysis"),
            )
        except LolcatsError as error:
            if wanted.asked:
                raise
            subject.notes.append(f"not analysed: {error}")


def read_texts(texts: Sequence[str]) -> Mapping[str, str]:
    """Name -> text, of files by their names and of texts by their beginnings.

    Raises:
        LolcatsError: a file is no UTF-8 text, or empty.
    """
    found: dict[str, str] = {}
    for text in texts:
        file = Path(text).expanduser() if len(text) < 4096 and "\n" not in text else Path()
        name, content = " ".join(text.split())[:MOST_NAME], text
        if file.is_file():
            try:
                name, content = file.name, file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise LolcatsError(f"cannot read the text {file}: {error}; expected UTF-8 text") from error
        if not content.strip():
            raise LolcatsError(f"the text {name or repr(text)} is empty; give some words, or a file of text")
        found[name] = content
    return found
