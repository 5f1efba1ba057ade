"""The table: columns, means over seeds, files, plots."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lolcats import LolcatsError
from lolcats.runs.folder import RunFolder
from lolcats.sweep import Sweep, SweepMeasurement, Table, draw_plots, run_sweep
from lolcats.sweep.results import show_number

SEEDS = {"grid": {"linearization.window": [4, 8], "seed": [0, 1, 2]}}


@pytest.fixture
def fake(make_sweep: Callable[..., Sweep], finish: Callable[..., None]) -> Callable[..., Table]:
    """A table of finished runs, by default of `SEEDS`, with numbers of our own."""

    def make(value: Callable[[int, int], float | None], **parts: object) -> Table:
        sweep = make_sweep(**(parts or SEEDS))
        finish(sweep)
        numbers = SweepMeasurement(
            "numbers",
            lambda config, folder: {
                f"{section}.{name}": value(config.linearization.window, config.seed)
                for section in ("perplexity", "kl") for name in ("student", "window_only")
            },
            kept=False,
        )  # fmt: skip
        return run_sweep(sweep, "study.yaml", measurements=[numbers])

    return make


@pytest.mark.slow
def test_columns_are_those_of_the_runs(make_sweep: Callable[..., Sweep]) -> None:
    sweep = make_sweep(grid={"finetune.rank": [2, 3]})
    table = run_sweep(sweep, "study.yaml")
    results = RunFolder.of(sweep.runs[1].config).results()
    columns = table.runs[1].columns
    for section in ("perplexity", "kl", "tokens_per_second", "seconds"):
        for name, value in getattr(results, section).items():
            assert (section, name) == ("kl", "teacher") or columns[f"{section}.{name}"] == value
    assert table.columns()[:4] == [f"perplexity.{n}" for n in ("teacher", "training_free", "transfer", "student")]
    assert table.means == [] and table.rows is table.runs
    with (sweep.folder / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["finetune.rank"] for line in lines] == ["2", "3"]
    assert float(lines[1]["perplexity.student"]) == results.perplexity["student"]
    assert lines[1]["stage_1_from"] == "rank-2"
    saved = json.loads((sweep.folder / "results.json").read_text())
    assert saved["runs"][1]["columns"] == columns and saved["axes"] == {"finetune.rank": [2, 3]}
    assert "| 3 | finished |" in (sweep.folder / "results.md").read_text()


@pytest.mark.slow
def test_mean_and_deviation_over_seeds(fake: Callable[..., Table]) -> None:
    table = fake(lambda window, seed: window + seed**2)
    assert [row.settings for row in table.means] == [{"linearization.window": 4}, {"linearization.window": 8}]
    for row, window in zip(table.means, (4, 8), strict=True):
        values = [window, window + 1, window + 4]
        assert row.status == "3/3 seeds"
        assert row.columns["perplexity.student"] == pytest.approx(statistics.mean(values))
        assert row.spread["perplexity.student"] == pytest.approx(statistics.stdev(values))
    assert len(table.runs) == 6 and table.rows is table.means


@pytest.mark.slow
def test_a_mean_is_not_made_without_one_of_its_numbers(fake: Callable[..., Table]) -> None:
    table = fake(lambda window, seed: float("inf") if (window, seed) == (8, 1) else 1.0)
    assert table.means[0].columns["perplexity.student"] == 1.0
    assert table.means[1].columns["perplexity.student"] is None
    assert "perplexity.student" not in table.means[1].spread


@pytest.mark.slow
def test_seeds_alone_are_one_mean(fake: Callable[..., Table]) -> None:
    table = fake(lambda window, seed: float(seed), grid={"seed": [0, 2]})
    assert len(table.means) == 1 and table.means[0].columns["kl.student"] == 1.0


def test_numbers_as_people_read_them() -> None:
    assert [show_number(x) for x in (None, 0.12345, 12.345, 12345.6, 1.5e9)] == [
        "-", "0.1235", "12.35", "12,346", "1.50e+09"
    ]  # fmt: skip
    assert show_number(20.017, 0.123) == "20.02 ± 0.12"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "files"),
    [
        (SEEDS, ["plot-linearization.window.png"]),
        ({"grid": {"seed": [0, 1]}}, ["plot-seed.png"]),
        ({"grid": {"linearization.window": [4]}}, []),
        (
            {
                "grid": {"linearization.window": [2, 4, 40]},
                "runs": [{"name": "a"}, {"name": "b", "linearization.sinks": 0}],
            },
            ["plot-run.png", "plot-linearization.window.png"],
        ),
        ({"grid": {"linearization.layers": ["all", 0.5, [0]]}}, ["plot-linearization.layers.png"]),
    ],
    ids=["seeds", "seed", "one value", "two axes", "mixed"],
)
def test_a_plot_for_each_axis(
    fake: Callable[..., Table], tmp_path: Path, parts: dict[str, object], files: list[str]
) -> None:
    image = pytest.importorskip("matplotlib.image")
    table = fake(lambda window, seed: 10.0**window if window < 40 else None, **parts)
    drawn = draw_plots(table, tmp_path)
    assert [file.name for file in drawn] == files
    for file in drawn:
        pixels = image.imread(file)
        assert pixels.shape[1] > 1000 and pixels.std() > 0.01, "not blank"


@pytest.mark.slow
def test_plots_without_matplotlib(fake: Callable[..., Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LolcatsError, match=r'pip install "lolcats\[report\]"'):
        draw_plots(fake(lambda window, seed: 1.0), tmp_path)
