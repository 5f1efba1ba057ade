"""The rules that draw words from numbers, at their edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lolcats.config import load_config
from lolcats.evaluation.recall import Cell
from lolcats.report import Finding, Subject, verdict
from lolcats.report.measured import EvaluateFile, RecallFile, Score
from lolcats.report.summary import summary
from lolcats.report.verdict import AS_GOOD
from lolcats.runs.results import Results

from .made import make_analysis, make_results

FAR = ("linearization.far=linear", "linearization.budget=uniform")


def make_subject(*settings: str, results: Results | None = None, **more: Any) -> Subject:
    """One with made-up results, whose layers have a far half and keep pairs unless `settings` say otherwise."""
    config = load_config("recommended", ["model=demo", "data.sequence_length=1024", *FAR, *settings])
    return Subject("x", Path("runs/x"), config, make_results() if results is None else results, **more)


def finding(subject: Subject, key: str) -> Finding:
    """The one of this key."""
    return next(found for found in verdict(subject) if found.key == key)


@pytest.mark.parametrize(
    ("value", "kind", "answer"), [(11.6, "good", "yes"), (11.5, "same", "no difference"), (11.2, "bad", "no")]
)
def test_far_half(value: float, kind: str, answer: str) -> None:
    """It helps where perplexity is more than 1 % higher without it; 11.4066 is the student's."""
    subject = make_subject()
    subject.results.perplexity["near_only"] = value
    found = finding(subject, "far")
    assert (found.kind, found.answer) == (kind, answer)
    assert f"Perplexity 11.41; without it {value:.2f}" in found.text and not found.command
    assert found.text.endswith("% lower." if kind == "bad" else "% higher.")


def test_far_half_by_the_kind_of_layer() -> None:
    """Its control is that of the layer: with kept pairs, without, and of the paper's layer; or there is none."""
    assert finding(make_subject(), "far").text.endswith("12.11, 6.1 % higher.")
    without_pairs = make_subject("linearization.kept.pairs=0")
    assert finding(without_pairs, "far").text.endswith("13.53, 18.6 % higher.")
    hybrid = Subject("x", Path("runs/x"), load_config("paper", ["model=demo"]), make_results())
    assert finding(hybrid, "far").text.endswith("13.53, 18.6 % higher.")
    assert finding(hybrid, "pairs").answer == finding(without_pairs, "pairs").answer == "it keeps none"
    none = make_subject("linearization.far=none")
    assert finding(none, "far").answer == "it has none" and finding(none, "far").text.endswith("a pair or forgotten.")
    assert finding(none, "pairs").text == "Perplexity 11.41; without them 13.53, 18.6 % higher."
    bare = make_subject("linearization.far=none", "linearization.kept.pairs=0")
    assert finding(bare, "far").text == "What leaves the window is forgotten."
    both = finding(make_subject(), "pairs").text
    assert both == "Perplexity 12.11; without them 13.53, 11.7 % higher. Both without the far half."


def test_window(tmp_path: Path) -> None:
    """The trained window counts; without it the untrained does, with what is missing."""
    subject = make_subject()
    found = finding(subject, "window")
    assert (found.kind, found.command) == ("good", "") and "trained as long, has 12.27, 7.5 % higher." in found.text
    del subject.results.perplexity["trained_window"]
    found = finding(subject, "window")
    assert "nothing trained, has 12.57" in found.text and "No window was trained" in found.text and not found.command
    (tmp_path / "controls" / "trained_window").mkdir(parents=True)
    (tmp_path / "controls" / "trained_window" / "adapter_config.json").write_text("{}")
    subject.model = tmp_path
    found = finding(subject, "window")
    assert "was not measured" in found.text
    assert found.command == ("lolcats evaluate runs/x --control trained_window --json runs/x/evaluate.json")
    subject.results.perplexity["equal_window"] = 11.0
    assert finding(subject, "window").kind == "bad" and "11.00, 3.6 % lower." in finding(subject, "window").text


def test_a_control_from_another_text_says_so() -> None:
    """Both perplexities are of one text, which is named where it is not the run's own."""
    subject = make_subject()
    del subject.results.perplexity["near_only"]
    scores = {"student": Score(perplexity=20.0), "near_only": Score(perplexity=25.0)}
    subject.evaluations = [EvaluateFile(file=Path("other.json"), length=512, scores=scores)]
    text = "Perplexity 20.00; without it 25.00, 25.0 % higher (other.json, 512 tokens)."
    assert finding(subject, "far").text == text


def test_nothing_measured_says_what_measures() -> None:
    """Every finding of an empty run names its command, and none of them makes a claim."""
    subject = make_subject(results=Results())
    for found in verdict(subject):
        assert found.kind == "unknown" and found.answer == "not measured" and found.command.startswith("lolcats ")
    assert "--control near_only" in finding(subject, "far").command
    assert "--beyond 4" in finding(subject, "length").command
    assert summary(subject).quality == []


def evaluation(student: dict[str, float], teacher: dict[str, float], context: int | None = 4096) -> EvaluateFile:
    """A file of `lolcats evaluate --beyond`."""
    length = max(int(place.partition("-")[2]) for place in student)
    scores = {
        name: Score(perplexity=10.0, by_position=dict(places), context=context)
        for name, places in (("student", student), ("teacher", teacher))
    }
    return EvaluateFile(file=Path("evaluate.json"), length=length, scores=scores)


PLACES = ("1-512", "512-1024", "1024-2048", "2048-4096", "4096-8192")


@pytest.mark.parametrize(
    ("student", "teacher", "answer", "kind"),
    [
        ((12, 10, 10, 10, 10), (12, 10, 10, 10, 10), "8,192 tokens at least", "good"),
        ((12, 10, 10 * AS_GOOD, 10, 10), (12, 10, 10, 10, 10), "8,192 tokens at least", "good"),
        ((12, 10, 10.6, 10, 10), (12, 10, 10, 10, 10), "up to 1,024 tokens", "mixed"),
        ((12, 10, 12, 10, 10), (12, 10, 12, 10, 10), "8,192 tokens at least", "good"),  # harder for both
        ((12, 10, 10, 14, 10), (12, 10, 10, 10, 10), "up to 2,048 tokens", "good"),
        ((12, 10, 10, 10, 30), (12, 10, 10, 10, 90), "up to 4,096 tokens", "good"),  # the teacher is lost too
    ],
)
def test_length(student: tuple[float, ...], teacher: tuple[float, ...], answer: str, kind: str) -> None:
    """As long as its perplexity, or within the teacher's context the ratio to it, is what it is in training."""
    places: list[dict[str, float]] = [{**dict(zip(PLACES, side, strict=True))} for side in (student, teacher)]
    found = finding(make_subject(evaluations=[evaluation(places[0], places[1])]), "length")
    assert (found.answer, found.kind, found.command) == (answer, kind, "")


def test_length_has_its_numbers() -> None:
    """The range that decides and that of training, each beside the teacher, whom a longer text may help more."""
    student: dict[str, float] = {**dict(zip(PLACES, (12, 10, 10, 10, 10.2), strict=True))}
    teacher: dict[str, float] = {**dict(zip(PLACES, (12, 9.9, 9, 8, 7.5), strict=True))}
    found = finding(make_subject(evaluations=[evaluation(student, teacher)]), "length")
    assert found.text == (
        "It was trained on texts of 1,024 tokens. Perplexity is 10.20 (teacher 7.50) from 4,096 to 8,192; "
        "it is 10.00 (teacher 9.90) from 512 to 1,024."
    )
    student["1024-2048"] = 14
    found = finding(make_subject(evaluations=[evaluation(student, teacher)]), "length")
    assert "Perplexity is 14.00 (teacher 9.00) from 1,024 to 2,048; it is 10.00" in found.text


def test_length_that_was_not_tried() -> None:
    """Results of a run alone end where its training does."""
    found = finding(make_subject(), "length")
    assert found.kind == "unknown" and found.answer == "1,024 tokens were tried"


@pytest.mark.parametrize(
    ("scores", "kind", "answer"),
    [
        ({("student", 1024): 0.9, ("teacher", 1024): 1.0}, "good", "as the teacher's"),
        ({("student", 1024): 0.89, ("teacher", 1024): 1.0}, "mixed", "part of it"),
        ({("student", 1024): 0.19, ("teacher", 1024): 0.4}, "bad", "little"),
        (
            {("student", 1024): 1.0, ("teacher", 1024): 1.0, ("student", 4096): 0.2, ("teacher", 4096): 1.0},
            "mixed",
            "part of it",
        ),
        ({("student", 512): 0.5}, "plain", "the teacher was not asked"),
    ],
)
def test_recall(scores: dict[tuple[str, int], float], kind: str, answer: str) -> None:
    """Within the texts of training and at the longest, against the teacher."""
    cells = [Cell(name, "passkey", length, score, [], []) for (name, length), score in scores.items()]
    found = finding(make_subject(recalls=[RecallFile(file=Path("recall.json"), cells=cells)]), "recall")
    assert (found.kind, found.answer) == (kind, answer)
    for length, score in ((length, score) for (name, length), score in scores.items() if name == "student"):
        assert f"{100 * score:.0f} % found in {length:,} tokens" in found.text


def test_recall_has_a_sentence_a_task() -> None:
    """Both lengths of a task stand in it."""
    cells = [Cell("student", task, length, 0.5, [], []) for task in ("passkey", "vt") for length in (1024, 4096)]
    found = finding(make_subject(recalls=[RecallFile(file=Path("recall.json"), cells=cells)]), "recall")
    sentence = "50 % found in 1,024 tokens, 50 % found in 4,096 tokens."
    assert found.text == f"passkey: {sentence} vt: {sentence}"


def test_worst_layers(tmp_path: Path) -> None:
    """By relative error, with the mean of all; small ones have digits too."""
    analysis = make_analysis(tmp_path)
    found = finding(make_subject(analysis=analysis), "layers")
    assert found.answer == "1, 2, 3" and "52 %, 33 %, 24 %" in found.text and "30 %" in found.text
    errors = [0.00184, 0.0017, 0.001, 0.00005]
    layers = [
        layer.model_copy(update={"relative_error": e}) for layer, e in zip(analysis.layers or [], errors, strict=True)
    ]
    found = finding(make_subject(analysis=analysis.model_copy(update={"layers": layers})), "layers")
    assert "0.18 %, 0.17 %, 0.10 %" in found.text and "0.11 %" in found.text


def test_commands_can_be_pasted() -> None:
    """Folders with spaces are quoted."""
    subject = make_subject(results=Results())
    subject.place = Path("runs/a b")
    assert all("'runs/a b" in found.command for found in verdict(subject))
