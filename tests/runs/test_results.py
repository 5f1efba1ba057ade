"""results.json: of this version, of version 0.1, of a later one, and with numbers that JSON does not have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lolcats import LolcatsError
from lolcats.evaluation import Measurement
from lolcats.runs.results import Results, read_results

OLD: dict[str, Any] = {  # as version 0.1 wrote it
    "date": "2026-11-23", "model": "demo", "device": "cpu", "dtype": "float32", "seed": 0,
    "evaluation": {"segments": 3, "length": 24, "last": None, "tokens": 69},
    "perplexity": {"teacher": 20.0, "student": 28.5, "no_attention": math.inf},
    "kl": {"teacher": 0.0, "student": 0.5, "no_attention": math.nan},
    "by_position": {"no_attention": {"1-24": math.inf}},
    "tokens": {"transfer": 480}, "tokens_per_second": {"transfer": 63469.4}, "seconds": {"transfer": 1.5, "total": 2.5},
    "generation": {"prompt": "The", "teacher": " cat", "student": " hat"},
    "best": {"transfer": {"step": 5, "loss": 12.7}}, "notes": {"sample of the teacher": "OSError: x"},
    "complete": True,
}  # fmt: skip


def read(tmp_path: Path, content: Any) -> Results:
    (tmp_path / "results.json").write_text(json.dumps(content))
    return read_results(tmp_path / "results.json")


def test_results_of_version_0_1(tmp_path: Path) -> None:
    results = read(tmp_path, OLD)
    assert results.version == 2 and results.complete and results.memory is None
    assert results.perplexity == {"teacher": 20.0, "student": 28.5, "no_attention": None}
    assert results.best["transfer"].loss == 12.7 and results.evaluation.tokens == 69
    assert results.notes == {
        "sample of the teacher": "OSError: x", "perplexity.no_attention": "infinite", "kl.no_attention": "not a number",
        "by_position.no_attention.1-24": "infinite",
    }  # fmt: skip
    (tmp_path / "results.json").write_text(results.text())
    assert read_results(tmp_path / "results.json") == results


def test_the_file_holds_finite_numbers_alone(tmp_path: Path) -> None:
    results = Results()
    results.store("student", Measurement(math.inf, 800.0, None, 69, {"1-64": 3.5, "64-69": math.inf}))
    content = json.loads(results.text(), parse_constant=lambda name: pytest.fail(name))
    assert content["version"] == 2
    assert content["perplexity"] == {"student": None} and content["by_position"]["student"]["1-64"] == 3.5
    assert content["notes"] == {"perplexity.student": "infinite", "by_position.student.64-69": "infinite"}
    again = read(tmp_path, content)
    again.store("student", Measurement(7.0, 2.0, 0.5, 69, {"1-64": 3.5, "64-69": 8.0}))
    assert json.loads(again.text())["notes"] == {}, "what is measured anew has no note of before"


def test_people_are_told_where_the_time_went() -> None:
    results = Results(seconds={"transfer": 95.4, "total": 200.0})
    assert results.time_line() == "", "a file of before does not say"
    results.add_seconds("loading", 12.0)
    results.add_seconds("measuring", 20.0)
    results.add_seconds("measuring", 10.0)
    expected = "12 s loading, 95 s transfer, 30 s measuring, 63 s validation, samples and saving; 200 s in all"
    assert results.time_line() == f"time: {expected}"
    results.seconds["total"] = 100.0  # a resumed run, whose stages count steps that its clock has not seen
    assert ", 0 s validation, samples and saving; 100 s in all" in results.time_line()


def test_what_a_later_version_wrote_is_kept(tmp_path: Path) -> None:
    later = {"version": 7, "flux": [1], "evaluation": {"tokens": 3, "flux": 1}, "memory": None}
    content = json.loads(read(tmp_path, later).text())
    assert (content["version"], content["flux"], content["evaluation"]["flux"]) == (7, [1], 1)


@pytest.mark.parametrize(
    "content",
    [[], 3, {"perplexity": {"teacher": "x"}}, {"perplexity": {"teacher": True}}, {"kl": 3}, {"tokens": {"a": 1.5}},
     {"generation": {"teacher": 3}}, {"best": {"transfer": 3}}, {"evaluation": 3}, {"complete": "yes"}],
    ids=str,
)  # fmt: skip
def test_what_is_no_result_is_named(tmp_path: Path, content: Any) -> None:
    with pytest.raises(LolcatsError, match=r"results\.json cannot be used: .*; delete it and resume"):
        read(tmp_path, content)


def test_nothing_is_measured_without_a_file(tmp_path: Path) -> None:
    assert read_results(tmp_path / "results.json") == Results() and not Results().perplexity
