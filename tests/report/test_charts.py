"""The charts: which rows they draw, at first and on which axes."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from lolcats.report import gather
from lolcats.report.charts.kept import kept_figures
from lolcats.report.charts.layers import layer_figures
from lolcats.report.charts.quality import PERPLEXITY as PERPLEXITY_NAME
from lolcats.report.charts.quality import RATIO, position_figure
from lolcats.report.charts.theme import look
from lolcats.report.figure import Figure, show_cell
from lolcats.report.sections import make_sections

from .made import LAYERS, PERPLEXITY, make_run

pytestmark = pytest.mark.slow


def drawn(spec: dict[str, Any], data: Any = None, encoding: Any = None) -> list[tuple[dict[str, Any], list[Any]]]:
    """The encodings of all layers of a chart, each with its rows."""
    data, own = spec.get("data", data), {**(encoding or {}), **spec.get("encoding", {})}
    layers = [found for layer in spec.get("layer", ()) for found in drawn(layer, data, own)]
    return layers or [(own, data.get("values", data.get("name")) if data else [])]


def chosen_rows(figure: Figure) -> list[dict[str, Any]]:
    """The rows that a chart shows at first, of all that have what is chosen in its lists."""
    assert figure.spec is not None
    lists = [one for one in figure.spec["params"] if one["name"].startswith("choose_")]
    chosen = {one["name"].removeprefix("choose_"): one["value"] for one in lists}
    rows = {id(row): row for _, rows in drawn(figure.spec) for row in rows}.values()
    return [row for row in rows if all(row.get(name) == value for name, value in chosen.items())]


def test_perplexity_by_position_shows_the_ratio_at_first(run: Path) -> None:
    """Perplexity itself falls so far over a text that a good student cannot be told from its teacher."""
    figure = position_figure(gather([run]))
    assert figure is not None
    rows = chosen_rows(figure)
    assert {row["text"] for row in rows} == {"beyond.json, 4,096 tokens"}
    shown = {(row["line"], row["start"]): row["value"] for row in rows}
    assert shown["teacher", 64] == 1 and shown["student", 64] == pytest.approx(
        PERPLEXITY["student"] / PERPLEXITY["teacher"], rel=1e-4
    )


def test_the_legend_names_what_a_text_has(run: Path) -> None:
    """Of the variants of all texts those of the chosen one, and as a ratio none without a teacher."""
    (subject,) = gather([run])
    scores = subject.evaluations[0].scores
    subject.evaluations[0].scores = {name: scores[name] for name in ("teacher", "student")}
    del subject.results.by_position["teacher"]
    figure = position_figure([subject])
    assert figure is not None and figure.spec is not None
    lines = next(one["value"] for one in figure.spec["params"] if one["name"] == "lines")
    assert lines[RATIO] == {"beyond.json, 4,096 tokens": ["teacher", "student"]}
    own = lines[PERPLEXITY_NAME]["measured when it was made, 1,024 tokens"]
    assert len(own) == len(PERPLEXITY) - 1 and "teacher" not in own


def test_long_names_have_a_row_each() -> None:
    """In the legend, where two of them do not fit beside each other."""
    columns = [look("line", names)["color"].to_dict()["legend"]["columns"] for names in (["a", "b"], ["a", "b" * 30])]
    assert columns == [2, 1]


def test_layers_of_several_runs(tmp_path: Path) -> None:
    """A line a run, for there are few looks; and a list of validations that has those of each run, no others."""
    runs = [make_run(tmp_path, "one"), make_run(tmp_path, "two")]
    lines = (runs[1] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (runs[1] / "metrics.jsonl").write_text("".join(lines[:20]))
    figures = {figure.key: figure for figure in layer_figures(gather(runs))}
    assert {row["line"] for row in chosen_rows(figures["layers"])} == {"one", "two"}
    shown = chosen_rows(figures["layers_in_training"])
    assert len(shown) == LAYERS and shown[0]["at"].startswith("two, stage 1, step ")


@pytest.mark.parametrize(
    ("value", "text"),
    [(100.0, "100"), (95.0, "95"), (2880.0, "2,880"), (23.5, "23.50"), (0.139, "0.1390"), (163.93, "163.93"),
     (0.0, "0"), (3.6e-6, "3.6e-06"), (None, "-"), (7, "7")],
)  # fmt: skip
def test_cells(value: float | None, text: str) -> None:
    """Whole numbers as such, and as many digits where there are others in the column."""
    assert show_cell(value) == text


def test_benchmarks_tell_their_error(run: Path) -> None:
    """So that nobody takes chance for a difference."""
    sections, _ = make_sections(gather([run]), [])
    (figure,) = (figure for section in sections for figure in section.figures if figure.key == "benchmarks")
    assert figure.text.endswith("standard error is at most 0.050.")


def test_what_is_drawn_on_logarithmic_axes_is_positive(run: Path) -> None:
    """One 0 in any layer of a chart, and all of it is drawn in one place."""
    checked = 0
    for section in make_sections(gather([run]), [])[0]:
        for figure in section.figures:
            spec = figure.spec or {}
            layers = drawn(spec)
            for axis in ("x", "y"):
                told = [(encoding[axis], rows) for encoding, rows in layers if axis in encoding]
                if any((one.get("scale") or {}).get("type") == "log" for one, _ in told):
                    for one, rows in told:
                        rows = spec["datasets"][rows] if isinstance(rows, str) else rows
                        values = [row[one["field"]] for row in rows if row.get(one.get("field")) is not None]
                        assert all(value > 0 for value in values), (figure.key, axis)
                        checked += len(values)
    assert checked > 20


def test_many_lines_look_different() -> None:
    """More than there are colours; shape tells them apart in the legend too."""
    looks = look("line", [f"line {n}" for n in range(20)])
    scales = [looks[name].to_dict()["scale"]["range"] for name in ("color", "shape")]
    assert len(set(zip(*scales, strict=True))) == 20


def test_kept_pairs_are_distances_on_the_page(run: Path) -> None:
    """Whose sums are the positions; the token of each is told once, of all runs that were analysed alike."""
    first, second = gather([run]), gather([run])
    second[0].name = "second"
    figure = next(iter(kept_figures([*first, *second])))
    assert figure.spec is not None and first[0].analysis is not None and first[0].analysis.kept is not None
    rows = [row for _, rows in drawn(figure.spec) for row in rows]
    kept = [one.positions for one in first[0].analysis.kept]
    assert [list(accumulate(row["step"])) for row in rows] == 2 * kept
    (tokens,) = next(one["value"] for one in figure.spec["params"] if one["name"] == "tokens")
    assert tokens.keys() == {str(position) for positions in kept for position in positions}


def test_kept_pairs_have_a_mean(run: Path) -> None:
    """Over the key heads that have to choose: 60 % of what the oracle keeps, where chance gives 22 or 23 of 180."""
    (subject,) = gather([run])
    assert subject.analysis is not None and subject.analysis.kept is not None
    subject.analysis.kept[0].candidates = len(subject.analysis.kept[0].positions)
    subject.analysis.kept[0].overlap_oracle = 1.0
    figure = list(kept_figures([subject]))[-1]
    assert figure.text.endswith("On average: 0.60 of the oracle's, by chance 0.12.")
