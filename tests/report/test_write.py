"""The files: the page, and beside it numbers to the last digit and a picture of every chart."""

from __future__ import annotations

import csv
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lolcats.errors import LolcatsError
from lolcats.report import check_report, gather, write_report
from lolcats.report.charts.attention import ALPHABET, LEVELS, TextMaps, attention_figure, encode, pooled
from lolcats.report.charts.lora import error_rows, lora_rows
from lolcats.report.charts.theme import thinned
from lolcats.report.figure import Table
from lolcats.report.generations import comparisons
from lolcats.report.page import bundle, policy
from lolcats.report.sections import make_sections
from lolcats.report.summary import summary
from lolcats.variants import label, score_cells

from .made import EVIL, LAYERS, PERPLEXITY, make_cells, make_run

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "src/lolcats/report/templates/page.css"


def rows_of(folder: Path, key: str) -> list[dict[str, str]]:
    """A CSV file."""
    with (folder / f"{key}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_are_those_of_the_files(page_file: Path, run: Path) -> None:
    """Perplexities, recall, benchmarks, layers and losses, to the last digit."""
    folder = page_file.with_name("report_files")
    perplexity = rows_of(folder, "perplexity")
    assert [float(row["perplexity"]) for row in perplexity] == 2 * list(PERPLEXITY.values())
    own = {row["variant"]: float(row["perplexity"]) for row in rows_of(folder, "perplexity_by_position")
           if row["start"] == "64" and row["text"].endswith("measured when it was made, 1,024 tokens")}  # fmt: skip
    assert own["student"] == 1.1 * PERPLEXITY["student"]
    scores = {(row["task"], int(row["tokens"])): row for row in rows_of(folder, "recall_scores")}
    for cell in make_cells():
        shown = scores[cell.task, cell.length]
        assert float(shown[cell.variant.replace("_", " ")]) == 100 * cell.score
    assert [row["student"] for row in rows_of(folder, "benchmarks")] == ["0.698765432", ""]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["stage"] == "finetune" and "loss" in line]
    written = [
        row for row in rows_of(folder, "training_finetune") if (row["kind"], row["measure"]) == ("training", "loss")
    ]
    assert [float(row["value"]) for row in written] == losses
    assert [float(row["relative_error"]) for row in rows_of(folder, "layers")] == [0.11, 0.52, 0.33, 0.24]


def test_the_summary_is_the_table_of_evaluate(run: Path) -> None:
    """With its words and its digits."""
    (subject,) = gather([run])
    first = summary(subject)
    expected = [(label(name), cells) for name, cells in score_cells(subject.results.perplexity, subject.results.kl)]
    assert [(name, cells) for name, cells, _ in first.quality] == expected
    assert first.cost == [
        ("stage 1", "1,000,000 tokens, 90 s"),
        ("stage 2", "2,000,000 tokens, 10.0 min"),
        ("all, with loading and measuring", "13.3 min"),
    ]
    assert first.lacking == [] and "256.0 KV tokens" in first.memory_text


def test_every_figure_has_its_files(page_file: Path) -> None:
    """A CSV each, and a picture of each that is no table; names on the page are those of the files."""
    folder = page_file.with_name("report_files")
    page = page_file.read_text(encoding="utf-8")
    figures = re.findall(r'<figure id="(\w+)">', page)
    assert len(figures) == len(set(figures)) > 15
    assert {file.stem for file in folder.glob("*.csv")} == set(figures)
    drawn = re.findall(r'data-spec="spec-(\w+)"', page) + [key for key in figures if key.startswith("recall_maps")]
    pictures = {file.stem: Image.open(file) for file in folder.glob("*.png")}
    assert set(pictures) == set(drawn)
    for picture in pictures.values():
        assert picture.width > 300 and len(picture.convert("RGB").resize((60, 60)).getcolors(9999) or []) > 5


def test_the_library_is_in_the_page_once(page_file: Path) -> None:
    """And runs by its hash alone; nothing on the page names another place."""
    page = page_file.read_text(encoding="utf-8")
    assert page.count(bundle()) == 1 and page.count("<script>") == 2
    head = html.unescape(page[: page.index("<style>")])
    assert "default-src 'none'" in head and "unsafe-eval" not in head and head.count("sha256-") == 2
    assert not re.search(r'(?:src|href)="(?!#|data:)', page.replace(bundle(), ""))
    assert policy(["a"]) != policy(["b"])


def test_several_side_by_side(tmp_path: Path) -> None:
    """One finished and one not, of which the page says so; runs are told apart, and drawn against each other."""
    runs = [make_run(tmp_path, "one"), make_run(tmp_path, "two", complete=False)]
    for run in runs:
        (run / "recall.json").unlink()  # its pictures take seconds
    subjects = gather(runs)
    sections, lacking = make_sections(subjects, [])
    keys = {figure.key: figure for section in sections for figure in section.figures}
    assert {row[0] for row in keys["layers"].table.rows} == {"one", "two"} and "error_by_perplexity" in keys
    assert [one.title for one in lacking] == ["Recall", "Attention"] and "two" in lacking[1].command
    assert [summary(subject).unfinished != "" for subject in subjects] == [False, True]


def test_the_summary_names_layer_and_text(run: Path) -> None:
    """The sizes that the budget found, in a sentence; the text by its name, not by where it lies."""
    (subject,) = gather([run])
    assert "Window of 128 tokens" in summary(subject).about and "shared out among heads" in summary(subject).about
    subject.results.split = [[[64, 0], [512, 96]]]
    subject.results.measured_with = {"sources": ["/data/texts/wikitext.u16", "hf:x/y"]}
    first = summary(subject)
    assert first.about.endswith("sinks, 8 bits, keeps 0 to 96 pairs per key head, score learned, no far half.")
    assert "demo. Window of 64 to 512 tokens" in first.about
    assert first.quality_text.startswith(
        "Measured when the run was made, on wikitext.u16, hf:x/y, in texts of 1,024 tokens. 16,368 tokens were "
    )
    assert first.memory_text.startswith("Memory of a text: ")


def test_generations_are_parted_at_the_first_difference(run: Path) -> None:
    """By tokens where they are known, else by words."""
    (subject,) = gather([run])
    (one,) = comparisons([subject])
    assert [side[1:] for side in one.sides] == [("one", f" two{EVIL}", ""), ("one", " three", "")]
    assert one.unit == "token" and not one.same
    subject.analysis = None
    subject.results.generation = {"prompt": "Why", "teacher": "so it is", "student": "so it was"}
    (one,) = comparisons([subject])
    assert [side[1:] for side in one.sides] == [("so it", " is", ""), ("so it", " was", "")] and one.unit == "word"
    subject.results.generation["student"] = "so it is"
    assert next(iter(comparisons([subject]))).same


def test_maps_lose_no_more_than_half_a_step() -> None:
    """What a character stands for, and that pooling keeps what a query gives in all."""
    weights = np.random.default_rng(0).dirichlet(np.ones(7), 7).astype(np.float32)
    text = encode(weights)
    rows, columns = np.tril_indices(7)
    levels = np.array([ALPHABET.index(character) for character in text])
    assert np.abs(levels / (LEVELS - 1) - np.sqrt(weights[rows, columns])).max() <= 0.5 / (LEVELS - 1) + 1e-6
    assert len(set(ALPHABET)) == LEVELS and json.dumps(ALPHABET) == f'"{ALPHABET}"'
    small = pooled(weights, 3)
    assert small.shape == (3, 3) and np.allclose(small.sum(-1), 1, atol=1e-6)
    assert np.allclose(small[2], [weights[6, :3].sum(), weights[6, 3:6].sum(), weights[6, 6]])


def test_many_maps_are_pooled_until_they_fit() -> None:
    """Three texts of 300 heads: with everything else a page stays below its five megabytes."""
    rng = np.random.default_rng(0)
    texts = []
    for number in range(3):
        maps = [rng.random((30, 10, 96, 96), dtype=np.float32) for _ in range(2)]
        texts.append(TextMaps(f"text {number}", ["x"] * 96, list(range(30)), list(range(10)), *maps))
    figure = attention_figure(texts)
    assert figure is not None and figure.spec is not None
    assert 500_000 < len(json.dumps(figure.spec)) < 2_000_000


def test_lora_as_training_wrote_it(run: Path) -> None:
    """Norms and ranks by layer and projection; errors at the first line and the last; else what the analysis has."""
    (subject,) = gather([run])
    rows = lora_rows(subject)
    assert len(rows) == 5 * LAYERS * 4 and rows[-1] == {
        "run": run.name, "layer": 3, "projection": "o_proj", "step": 40, "norm": 0.1 * 40 * 4, "effective_rank": 5.0,
    }  # fmt: skip
    errors = list(error_rows(subject))
    assert [(row["when"], row["step"], row["error"]) for row in errors if row["layer"] == 1] == [
        ("before LoRA", 0, 0.1 / 2), ("after LoRA", 40, 0.1 / 42),
    ]  # fmt: skip
    subject.lora = []
    assert {row["step"] for row in lora_rows(subject)} == {1, 2}
    assert [row["error"] for row in error_rows(subject)] == [0.1] * LAYERS


def test_experts_of_a_layer_are_told_apart(run: Path) -> None:
    """Modules that end alike are called by all that follows the number of the layer."""
    (subject,) = gather([run])
    names = ["model.layers.2.mlp.experts.0.up", "model.layers.2.mlp.experts.1.up", "model.layers.3.mlp.up", "lm_head"]
    subject.lora = [{"stage": "finetune", "step": 1, "modules": {name: [1.0, 2.0] for name in names}}]
    found = [(row["layer"], row["projection"]) for row in lora_rows(subject)]
    assert found == [(2, "mlp.experts.0.up"), (2, "mlp.experts.1.up"), (3, "up")]


def test_thinned_keeps_both_ends() -> None:
    assert thinned(range(5), 10) == [0, 1, 2, 3, 4]
    few = thinned(range(1000), 10)
    assert len(few) == 10 and (few[0], few[-1]) == (0, 999)


def test_a_table_keeps_every_digit() -> None:
    table = Table(["run", "a"], [['x,"y"', 0.1 + 0.2], ['x,"y"', None]])
    assert table.to_csv() == 'run,a\n"x,""y""",0.30000000000000004\n"x,""y""",\n'
    assert table.without_same("run").columns == ["a"] and table.numeric == [False, True]
    assert Table(["run"], [["x"], ["y"]]).without_same("run").columns == ["run"]


@pytest.mark.parametrize(
    ("name", "part"), [("report.pdf", "ends in .html"), ("mine.html", "notes.txt"), ("taken.html", "in the way")]
)
def test_nothing_of_others_is_replaced(tmp_path: Path, name: str, part: str) -> None:
    (tmp_path / "mine_files").mkdir()
    (tmp_path / "mine_files" / "notes.txt").write_text("x")
    (tmp_path / "taken_files").write_text("x")
    with pytest.raises(LolcatsError, match=part):
        check_report(tmp_path / name)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what installs it."""
    monkeypatch.setattr("lolcats.report.write.NEEDED", ("altair", "no_such_package"))
    with pytest.raises(LolcatsError, match=r'no_such_package: pip install "lolcats\[report\]"'):
        write_report([], tmp_path / "report.html")


def colors(style: str) -> dict[str, str]:
    """The custom colours of a rule."""
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6})", style))


def luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
    linear: list[Any] = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("number", [0, 1])
def test_text_can_be_read(number: int) -> None:
    """Contrast of 4.5 and more (WCAG AA) of all text on its grounds, light and dark."""
    found = colors(PAGE.read_text(encoding="utf-8").split(":root {")[1 + number].split("}")[0])
    grounds = {
        **dict.fromkeys(("ink", "soft", "link", "yes", "no", "open"), ("page", "card")),
        "ink": ("page", "card", "mark"),
    }
    for text, behind in grounds.items():
        for ground in behind:
            low, high = sorted((luminance(found[text]), luminance(found[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
