"""The size of the page: what each run adds shares the room that there is."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lolcats.report.charts.curves import ALL_POINTS, FEWEST_POINTS
from lolcats.report.charts.recall import MOST_PICTURES
from lolcats.report.figure import Figure
from lolcats.report.generations import comparisons
from lolcats.report.pack import PACKED, packed
from lolcats.report.page import Content, render
from lolcats.report.sections import make_sections
from lolcats.report.summary import summary

from .large import DRAWN, LAYERS, STEPS, large_maps, large_subject

pytestmark = pytest.mark.slow
MOST = 5_000_000
RUNS = 12


@pytest.fixture(scope="module")
def made() -> tuple[str, dict[str, Figure]]:
    """The page of many runs as large as SmolLM2's, and its figures."""
    subjects = [large_subject(number) for number in range(RUNS)]
    sections, lacking = make_sections(subjects, [large_maps(number) for number in range(RUNS)])
    content = Content([summary(subject) for subject in subjects], sections, lacking, list(comparisons(subjects)))
    return render(subjects, content, "files"), {f.key: f for section in sections for f in section.figures}


def test_a_page_of_many_runs_is_small(made: tuple[str, dict[str, Figure]]) -> None:
    """And has all its parts; of pictures it would have more, had all runs been asked for recall."""
    page, figures = made
    pictures = sum(map(len, re.findall(r'<img src="[^"]*"', page)))
    assert 50_000 < pictures / DRAWN < 200_000
    assert len(page.encode()) + (MOST_PICTURES - DRAWN) * pictures / DRAWN <= MOST
    assert figures.keys() >= {"heads", "kept_pairs", "attention", "training_finetune", "lora_steps", "recall_maps_0"}


def test_what_is_left_out_is_in_the_files(made: tuple[str, dict[str, Figure]]) -> None:
    """Tables have every step of every run, charts of them as many as there is room for, both ends among them."""
    _, figures = made
    curve = figures["training_finetune"]
    assert len(curve.table.rows) == RUNS * (5 * STEPS + 24) and curve.spec is not None
    rows = curve.spec["data"]["values"]
    assert 0.8 * ALL_POINTS < len(rows) < ALL_POINTS + 2 * RUNS * FEWEST_POINTS
    own = [row["step"] for row in rows if row["line"] == "recommended-3, training" and row["measure"] == "loss"]
    assert (own[0], own[-1]) == (1, STEPS) and len(own) > FEWEST_POINTS
    kept = figures["kept_pairs"]
    assert kept.spec is not None and f"of {LAYERS} layers." in kept.text
    assert len({row[1] for row in kept.table.rows}) == LAYERS


def unpacked(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, as page.js makes them."""
    columns = {}
    for name, kept in data[PACKED].items():
        if isinstance(kept, list):
            columns[name] = kept
        elif "times" in kept:
            columns[name] = [one for one, n in zip(kept["of"], kept["times"], strict=True) for _ in range(n)]
        else:
            columns[name] = [kept["of"][n] for n in kept["at"]]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_rows_come_out_as_they_went_in() -> None:
    """Whatever is in them; 1, 1.0 and true are not the same. Those without the same fields stay as they are."""
    words = ["ä", "b" * 20, "<c>"]
    rows = [
        {"same": "run", "word": words[n % 3], "number": n / 7, "list": [n // 50], "mixed": (1, 1.0, True, None)[n % 4]}
        for n in range(100)
    ]
    layer = {"data": {"values": rows, "name": "x"}, "mark": "line"}
    found = packed({"layer": [layer], "data": {"values": [{"a": 1}, {"b": 2}]}})
    assert found["data"] == {"values": [{"a": 1}, {"b": 2}]} and found["layer"][0]["mark"] == "line"
    columns = found["layer"][0]["data"][PACKED]
    assert columns["same"] == {"of": ["run"], "times": [100]} and set(columns["word"]) == {"of", "at"}
    assert columns["number"] == [row["number"] for row in rows]
    assert repr(unpacked(found["layer"][0]["data"])) == repr(rows) and "values" not in found["layer"][0]["data"]
