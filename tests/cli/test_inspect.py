"""What `lolcats inspect` tells of an analysis, and which command makes one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lolcats.evaluation.analysis import Analysis, write_analysis
from lolcats.evaluation.analysis.file import FILE, AnalysedText, HeadAnalysis, KeptAnalysis, LayerAnalysis

from .conftest import Run

FACTS: dict[str, Any] = {"model": "m", "date": "2026-01-02", "device": "cpu", "dtype": "float32"}


def layer(index: int, error: float, **shares: Any) -> LayerAnalysis:
    """One with two heads, the second of which is worse and looks nowhere far."""
    heads = [
        HeadAnalysis(head=0, key_head=0, relative_error=error / 2, **shares),
        HeadAnalysis(head=1, key_head=0, relative_error=error * 2),
    ]
    numbers = {"relative_error": error, "error": error / 10, "error_before": error / 5, "entropy": 1.25}
    return LayerAnalysis(layer=index, linearized=True, heads=heads, **numbers)


def pairs(count: int, oracle: float | None, stay: float | None) -> KeptAnalysis:
    """The last `count` of twenty."""
    kept: dict[str, Any] = {"positions": [*range(20 - count, 20)], "tokens": ["x"] * count, "scores": [0.5] * count}
    return KeptAnalysis(
        layer=0, key_head=0, candidates=20, stay_mean=stay, overlap_oracle=oracle, overlap_recency=0.75, **kept
    )


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_the_command_that_makes_one(cli: Run, run: Path) -> None:
    """For the run's folder, also where its model is named, and for a model by itself."""
    for source in (run, run / "model"):
        assert f"kept pairs by layer and head: lolcats report {run}\n" in cli("inspect", source).out
    alone = run.parent / "alone"
    shutil.copytree(run / "model", alone)
    assert f"lolcats report {alone}\n" in cli("inspect", alone).out


def test_essentials(cli: Run, run: Path) -> None:
    """The worst five layers, the worst first; means of what is known."""
    found = [
        *(layer(n, e, far_share_teacher=0.5, far_share_student=0.25) for n, e in enumerate((0.02, 0.4, 0.01, 0.3))),
        *(layer(n, e, far_share_teacher=0.1, far_share_student=0.05, kept_share=0.05) for n, e in ((4, 0.2), (5, 0.1))),
        LayerAnalysis(layer=6, linearized=False),
    ]
    text = AnalysedText(source="a book", segments=2, length=600)
    kept = [pairs(10, 0.5, 100.0), pairs(5, 1.0, 1400.0), pairs(0, None, None)]
    write_analysis(run, Analysis(**FACTS, text=text, layers=found, kept=kept))
    answer = cli("inspect", run)
    assert answer.code == 0 and "lolcats report" not in answer.out
    assert "worst layers, analysed 2026-01-02 on cpu: 1,200 tokens of a book" in answer.out
    rows = [line.split() for line in answer.out[answer.out.index("worst layers") :].splitlines()[2:7]]
    assert [row[0] for row in rows] == ["1", "3", "4", "5", "0"]
    assert rows[0] == ["1", "40.0%", "0.04", "0.08", "1.25", "50.0%", "25.0%", "1", "(80.0%)"]
    assert "teacher 36.7%, student 18.3% (kept pairs 5.0%)" in answer.out
    assert (
        "kept pairs: 75.0% of those that later attention would choose (37.5% by chance), 75.0% of the latest; "
        "a pair stays 750 tokens"
    ) in answer.out
    assert cli("inspect", run / "model").out == answer.out


def test_an_analysis_without_layers_or_kept_pairs(cli: Run, run: Path) -> None:
    write_analysis(run, Analysis(**FACTS))
    assert "lolcats report" in cli("inspect", run).out
    write_analysis(run, Analysis(**FACTS, layers=[layer(0, 0.1)], kept=[]))
    answer = cli("inspect", run)
    assert "teacher -, student -" in answer.out and "kept pairs" not in answer.out


def test_a_broken_analysis(cli: Run, run: Path) -> None:
    (run / FILE).write_text("[]")
    cli("inspect", run).refused(FILE, "delete it")
