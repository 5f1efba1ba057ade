"""What the numbers say in plain words: rules that draw a finding, or say which command would measure it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lolcats.evaluation.recall import Cell
from lolcats.printable import show_number
from lolcats.report.subject import Scores, Subject
from lolcats.variants import EQUAL_WINDOW, NEAR_ONLY, TRAINED_WINDOW, WINDOW_ONLY

SAME = 1.01
"""Ratio of two perplexities of one text up to which they are called the same."""
AS_GOOD = 1.05
"""Ratio of perplexities up to which a longer text is called as good as those of training."""
FOUND = 0.9
"""Share of what the teacher finds from which on recall is called kept."""
LITTLE = 0.5
"""Share of what the teacher finds below which little is left."""
WORST = 3
"""Layers that are named."""

Kind = Literal["good", "bad", "mixed", "same", "unknown", "plain"]
"""What the answer is to the reader: none of it is told by colour alone."""


class Finding(NamedTuple):
    """An answer to one question."""

    key: str
    question: str
    kind: Kind
    answer: str
    """In a word or two."""
    text: str
    """The numbers behind it."""
    command: str = ""
    """What measures it, where it is not measured."""


def verdict(subject: Subject) -> list[Finding]:
    """The findings of one run or model, in the order in which people ask."""
    found = [against_window(subject), far_half(subject), kept_pairs(subject), length(subject), recall_left(subject)]
    return [*found, worst_layers(subject)]


def against_window(subject: Subject) -> Finding:
    """Whether the student beats a plain window of the bytes of its state."""
    key, question = "window", "Better than a plain window of the same memory?"
    for control, trained in ((TRAINED_WINDOW, "trained as long"), (EQUAL_WINDOW, "nothing trained")):
        if (pair := _pair(subject, "student", control)) is None:
            continue
        kind = _compare(pair)
        text = f"Perplexity {show_number(pair.own)} (lower is better); a window of the same bytes, {trained}, has "
        text += f"{_change(pair)}."
        lacking = control != TRAINED_WINDOW and subject.config.finetune.enabled
        why, command = subject.window_advice if lacking else ("", "")
        text = f"{text} {why}".strip()
        return Finding(key, question, kind, _ANSWERS[kind], text, command)
    return _not_measured(key, question, subject.evaluate_command(EQUAL_WINDOW))


def far_half(subject: Subject) -> Finding:
    """Whether the linear half helps."""
    key, question = "far", "Does the far half, the linear state, help?"
    if not subject.has_far:
        lost = "kept as a pair or forgotten" if subject.keeps_pairs else "forgotten"
        return Finding(key, question, "plain", "it has none", f"What leaves the window is {lost}.")
    if (pair := _pair(subject, "student", subject.without_far)) is None:
        return _not_measured(key, question, subject.evaluate_command(subject.without_far))
    return Finding(key, question, kind := _compare(pair), _ANSWERS[kind], _without(pair, "it"))


def kept_pairs(subject: Subject) -> Finding:
    """Whether the pairs that are kept beyond the window help."""
    key, question = "pairs", "Do the kept pairs help?"
    if not subject.keeps_pairs:
        return Finding(key, question, "plain", "it keeps none", "Its layers keep no pairs.")
    names = (NEAR_ONLY, WINDOW_ONLY) if subject.has_far else ("student", WINDOW_ONLY)
    if (pair := _pair(subject, *names)) is None:
        return _not_measured(key, question, subject.evaluate_command(*(name for name in names if name != "student")))
    where = " Both without the far half." if subject.has_far else ""
    return Finding(key, question, kind := _compare(pair), _ANSWERS[kind], f"{_without(pair, 'them')}{where}")


def length(subject: Subject) -> Finding:
    """Up to which length it predicts as well as within the texts of its training."""
    key, question, trained = "length", "How long may a text be?", subject.trained_length
    command = subject.beyond_command
    longest = max(
        (scores for scores in subject.scores() if scores.by_position.get("student")),
        key=lambda scores: max(end for _, end in ranges(scores)),
        default=None,
    )
    if longest is None:
        return _not_measured(key, question, command)
    end = max(end for _, end in ranges(longest))
    text = f"It was trained on texts of {trained:,} tokens"
    if end <= trained:
        text += f"; longer ones than {end:,} were not measured."
        return Finding(key, question, "unknown", f"{end:,} tokens were tried", text, command)
    good = good_up_to(longest, trained)
    # The range that decides: the first that is worse, else the last one.
    decides = next((part for part in ranges(longest) if part[0] >= good), ranges(longest)[-1])
    text += f". {_in_range(longest, decides, 'Perplexity')}; {_in_range(longest, reference(longest, trained), 'it')}."
    if good >= end:
        return Finding(key, question, "good", f"{end:,} tokens at least", text)
    return Finding(key, question, "good" if good > trained else "mixed", f"up to {good:,} tokens", text)


def recall_left(subject: Subject) -> Finding:
    """What of recall is left."""
    key, question = "recall", "What recall is left?"
    cells = subject.cells()
    tasks = list(dict.fromkeys(task for variant, task, _ in cells if variant == "student"))
    if not tasks:
        return _not_measured(key, question, subject.command("recall", "passkey,niah_single_2"))
    lines, kept = [], []
    for task in tasks:
        lengths = sorted(length for variant, other, length in cells if (variant, other) == ("student", task))
        within = [length for length in lengths if length <= subject.trained_length]
        found = []
        for tokens in dict.fromkeys([within[-1] if within else lengths[0], lengths[-1]]):
            row = {variant: cells.get((variant, task, tokens)) for variant in ("student", "teacher", *_WINDOWS)}
            found.append(_recall_words(tokens, row))
            if row["teacher"] is not None and row["student"] is not None:
                kept.append(row["student"].score / row["teacher"].score if row["teacher"].score else 1.0)
        lines.append(f"{task}: {', '.join(found)}.")
    kind, answer = _recall_answer(kept)
    return Finding(key, question, kind, answer, " ".join(lines))


def worst_layers(subject: Subject) -> Finding:
    """Which layers are furthest from the teacher's attention."""
    key, question = "layers", "Which layers are worst?"
    found = [(layer.relative_error, layer.layer) for layer in subject.layers if layer.relative_error is not None]
    if not found:
        return _not_measured(key, question, shlex.join(["lolcats", "report", str(subject.place)]))
    worst = sorted(found, reverse=True)[:WORST]
    mean = sum(error for error, _ in found) / len(found)
    errors = ", ".join(_share(error) for error, _ in worst)
    text = f"Error of attention as a share of the teacher's output: {errors}; the mean over layers is {_share(mean)}."
    return Finding(key, question, "plain", ", ".join(str(number) for _, number in worst), text)


def ranges(scores: Scores) -> list[tuple[int, int]]:
    """The ranges [start, end) of positions in which the student was measured, in order."""
    return sorted((int(a), int(b)) for a, _, b in (name.partition("-") for name in scores.by_position["student"]))


def reference(scores: Scores, trained: int) -> tuple[int, int]:
    """The last range within the texts of training, by which longer ones are judged."""
    found = ranges(scores)
    return max((part for part in found if part[1] <= trained), default=found[0])


def good_up_to(scores: Scores, trained: int) -> int:
    """The end of the last range up to which all beyond training are as good as the last range within it.

    As good is a perplexity, or within the context of the teacher a ratio to the teacher's, of at most `AS_GOOD` times
    what it is there: the text differs from range to range, and beyond its context the teacher is no measure.
    """
    known = reference(scores, trained)
    good = known[1]
    for part in (part for part in ranges(scores) if part[0] >= known[1]):
        own, ratio = (_over(scores, part, known, by) for by in (None, "teacher"))
        inside = scores.context is None or part[1] <= scores.context
        if not ((own is not None and own <= AS_GOOD) or (inside and ratio is not None and ratio <= AS_GOOD)):
            break
        good = part[1]
    return good


_WINDOWS = (TRAINED_WINDOW, EQUAL_WINDOW)
_ANSWERS: dict[Kind, str] = {"good": "yes", "bad": "no", "same": "no difference"}


def _in_range(scores: Scores, part: tuple[int, int], what: str) -> str:
    """The student's perplexity in a range of positions, beside the teacher's."""
    own, teacher = (scores.by_position.get(name, {}).get("{}-{}".format(*part)) for name in ("student", "teacher"))
    beside = "" if teacher is None else f" (teacher {show_number(teacher)})"
    return f"{what} is {show_number(own)}{beside} from {part[0]:,} to {part[1]:,}"


def _share(error: float) -> str:
    """A share in percent, of two digits or more however small it is."""
    percent = 100 * error
    return f"{percent:.0f} %" if percent >= 9.95 else f"{percent:#.2g} %"


def _over(scores: Scores, part: tuple[int, int], reference: tuple[int, int], by: str | None) -> float | None:
    """The student's perplexity of a range over that of another, each divided by that of `by` where it is given."""
    values = []
    for start, end in (part, reference):
        own = scores.by_position["student"].get(f"{start}-{end}")
        base = 1.0 if by is None else scores.by_position.get(by, {}).get(f"{start}-{end}")
        if own is None or not base:
            return None
        values.append(own / base)
    return values[0] / values[1] if values[1] else None


class _Pair(NamedTuple):
    """Perplexities of two variants on one text."""

    own: float
    other: float
    where: str
    """Which text, where it is not that of the run itself."""


def _pair(subject: Subject, first: str, second: str) -> _Pair | None:
    """Two variants on the first text that has both."""
    for number, scores in enumerate(subject.scores()):
        one, other = scores.perplexity.get(first), scores.perplexity.get(second)
        if one and other:
            return _Pair(one, other, f" ({scores.text})" if number else "")
    return None


def _compare(pair: _Pair) -> Kind:
    """Good where the first perplexity is lower."""
    return "good" if pair.other > SAME * pair.own else "bad" if pair.own > SAME * pair.other else "same"


def _change(pair: _Pair) -> str:
    change = 100 * (pair.other / pair.own - 1)
    return f"{show_number(pair.other)}, {abs(change):.1f} % {'higher' if change >= 0 else 'lower'}{pair.where}"


def _without(pair: _Pair, what: str) -> str:
    return f"Perplexity {show_number(pair.own)}; without {what} {_change(pair)}."


def _recall_words(tokens: int, row: dict[str, Cell | None]) -> str:
    """What was found at one length."""
    student = row["student"]
    assert student is not None
    others = [("teacher", row["teacher"])]
    others.append(next((("trained window" if n == TRAINED_WINDOW else "window", c) for n in _WINDOWS if (c := row[n])),
                       ("window", None)))  # fmt: skip
    compared = ", ".join(f"{name} {100 * cell.score:.0f}" for name, cell in others if cell is not None)
    return f"{100 * student.score:.0f} % found in {tokens:,} tokens" + (f" ({compared})" if compared else "")


def _recall_answer(kept: Sequence[float]) -> tuple[Kind, str]:
    """By the shares of what the teacher finds."""
    if not kept:
        return "plain", "the teacher was not asked"
    if min(kept) >= FOUND:
        return "good", "as the teacher's"
    return ("bad", "little") if max(kept) < LITTLE else ("mixed", "part of it")


def _not_measured(key: str, question: str, command: str) -> Finding:
    return Finding(key, question, "unknown", "not measured", "", command)
