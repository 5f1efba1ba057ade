"""The page in a real browser: what it asks for, shows, and lets people do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from playwright.sync_api import Page

from lolcats.report import gather
from lolcats.report.charts.attention import LEVELS
from lolcats.report.page import Content, render
from lolcats.report.summary import summary

from .conftest import Opened
from .made import EVIL, make_map

MINUS = "\N{MINUS SIGN}"  # as Vega writes numbers
pytestmark = pytest.mark.slow
Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def opened(open_page: Open, page_file: Path) -> Opened:
    """The page on a desk, in light colours."""
    return open_page(page_file)


def test_nothing_is_asked_for_and_nothing_goes_wrong(opened: Opened, page_file: Path) -> None:
    """No console message, no request; all charts and images are there, in one file that is small enough."""
    page = opened.page
    assert page.locator(".chart svg").count() == page.locator(".chart").count() > 10
    images = page.locator("img").evaluate_all("found => found.map(one => [one.complete, one.naturalWidth, one.alt])")
    assert images and all(complete and width > 100 and alt for complete, width, alt in images)
    assert opened.wrong == []
    assert page_file.stat().st_size <= 5e6


def test_nothing_is_hidden_on_a_desk(opened: Opened) -> None:
    """Pictures are there to the last row, and benchmarks to the last column, which is the student's."""
    hidden = "one => [one.scrollHeight - one.clientHeight, one.scrollWidth - one.clientWidth]"
    for picture in opened.page.locator("figure > .scroll:has(> img)").all():
        assert picture.evaluate(hidden)[0] <= 0
    opened.page.set_viewport_size({"width": 1100, "height": 900})
    assert opened.page.locator("#benchmarks .scroll").evaluate(hidden)[1] <= 0
    opened.page.set_viewport_size({"width": 1280, "height": 900})


def test_cards_show_all_columns(open_page: Open, run: Path, tmp_path: Path) -> None:
    """Of three runs beside each other, each with all controls."""
    subjects, file = gather([run]), tmp_path / "cards.html"
    file.write_text(render(subjects, Content([summary(one) for one in 3 * subjects], [], [], []), "files"))
    page = open_page(file, 1200).page
    tables = page.locator("#summary .scroll")
    assert tables.count() >= 3
    assert tables.evaluate_all("found => found.map(one => one.scrollWidth - one.clientWidth)") == [0] * tables.count()


def test_texts_stay_texts(opened: Opened) -> None:
    """Names, prompts, notes and tokens with tags in them are shown as they are, in tooltips too."""
    page = opened.page
    assert page.title().startswith("made <script>")
    assert EVIL in page.locator("blockquote").first.inner_text().replace("\n", "")
    assert page.locator("img").count() == page.locator("figure img").count()
    for figure, mark in (("kept_pairs", ".mark-rect path"), ("attention", ".mark-rect path")):
        page.locator(f"#{figure} {mark}").first.hover()
        tooltip = page.locator("#vg-tooltip-element")
        tooltip.wait_for(state="visible")
        assert "<script>" in tooltip.inner_text() and tooltip.locator("img, script").count() == 0
    assert opened.wrong == []


def test_attention_shows_the_head_that_is_chosen(opened: Opened) -> None:
    """The worst layer and head at first; the tooltip has the weights of the map that was written."""
    page = opened.page
    figure = page.locator("#attention")
    chosen = [figure.locator(f"select[name=choose_{name}]").input_value() for name in ("layer", "head")]
    assert chosen == ["1", "3"]
    figure.locator(".mark-rect path").nth(1).hover()
    tooltip = page.locator("#vg-tooltip-element")
    tooltip.locator("td", has_text="a").first.wait_for(state="visible")
    names, values = (tooltip.locator(f"td.{kind}").all_inner_texts() for kind in ("key", "value"))
    rows = dict(zip(names, values, strict=True))
    assert (rows["query"], rows["key"], rows["query_token"]) == ("1", "0", "a")
    for seed, side in enumerate(("teacher", "student")):
        weight = float(make_map(seed)[1, 3, 1, 0])
        assert float(rows[side]) == pytest.approx(weight, abs=1.5 / LEVELS)
    assert float(rows["difference"].replace(MINUS, "-")) == pytest.approx(
        float(rows["student"]) - float(rows["teacher"])
    )


def test_choosing_changes_the_picture(opened: Opened) -> None:
    """Every list of every chart."""
    page, tried = opened.page, 0
    for choices in page.locator(".choices select").all():
        figure = choices.locator("xpath=ancestor::figure")
        before = figure.locator("svg").inner_html()
        values = choices.locator("option").evaluate_all("found => found.map(one => one.value)")
        assert len(values) > 1
        shown = {before}
        for value in values[1:]:
            choices.select_option(value)
            page.wait_for_timeout(30)
            shown.add(figure.locator("svg").inner_html())
        assert len(shown) > 1, (figure.get_attribute("id"), values)
        choices.select_option(values[0])
        page.wait_for_timeout(30)
        tried += 1
    assert tried > 10 and opened.wrong == []


def test_keyboard_alone(open_page: Open, page_file: Path) -> None:
    """Tab leads to the skip link, then on to lists and details, which keys open and change."""
    page = (opened := open_page(page_file)).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("!!document.activeElement.closest('main')")
    seen, name = set(), ""
    for _ in range(400):
        tag, name = page.evaluate("[document.activeElement.tagName, document.activeElement.name || '']")
        seen.add(tag)
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", tag
        if tag == "SUMMARY" and not page.evaluate("document.activeElement.parentElement.open"):
            page.keyboard.press("Enter")
            assert page.evaluate("document.activeElement.parentElement.open")
        if name == "choose_head":
            break
        page.keyboard.press("Tab")
    assert seen >= {"SELECT", "SUMMARY"} and name == "choose_head"
    before = page.locator("#attention svg").inner_html()
    page.keyboard.press("ArrowDown")
    page.wait_for_timeout(100)
    assert page.locator("#attention svg").inner_html() != before
    assert opened.wrong == []


def test_telephone(open_page: Open, page_file: Path) -> None:
    """At 400 pixels nothing runs off the side, opened or not; maps of attention stand below each other, later too."""
    page = (opened := open_page(page_file, 400)).page
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for details in page.locator("details").all():
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
            details.evaluate("one => { one.open = !one.open }")
    assert _rows_of_maps(page) == 3
    page.set_viewport_size({"width": 1280, "height": 900})
    page.wait_for_timeout(1000)
    assert _rows_of_maps(page) == 1
    assert opened.wrong == []


def _rows_of_maps(page: Page) -> int:
    """In how many rows the maps of attention stand."""
    found = page.locator("#attention [class*='_group']").evaluate_all(
        "found => found.map(one => Math.round(one.getBoundingClientRect().top / 50))"
    )
    return len(set(found))


def test_dark_and_print(opened: Opened) -> None:
    """Page and charts follow the system: light on dark. Paper has black on white, and nothing that it cannot do."""
    page = opened.page
    page.emulate_media(color_scheme="dark")
    ground, ink = _colors(page)
    assert sum(ground) < 150 and sum(ink) > 550
    content = page.pdf(format="A4")
    assert content.startswith(b"%PDF") and len(content) > 50_000
    page.emulate_media(media="print")
    ground, ink = _colors(page)
    assert sum(ground) == 3 * 255 and sum(ink) == 0
    assert not page.locator(".choices").first.is_visible() and not page.locator("nav").is_visible()
    page.emulate_media(media="screen", color_scheme="light")
    assert opened.wrong == []


def _colors(page: Page) -> list[list[int]]:
    """Red, green and blue of the page and of the text of a chart."""
    text = page.locator("#perplexity_by_position svg .role-axis-label text").first
    found = (
        page.evaluate("getComputedStyle(document.body).backgroundColor"),
        text.evaluate("e => getComputedStyle(e).fill"),
    )
    return [[int(part) for part in color[4:-1].split(",")] for color in found]


def test_structure(opened: Opened) -> None:
    """Language, one main heading, no level left out, labels, a text and a table for each chart, no name twice."""
    page = opened.page
    assert page.locator("html").get_attribute("lang") == "en" and page.locator("h1").count() == 1
    levels = page.locator("h1, h2, h3, h4").evaluate_all("found => found.map(one => Number(one.tagName[1]))")
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = page.locator("[id]").evaluate_all("found => found.map(one => one.id)")
    assert len(set(ids)) == len(ids)
    assert page.locator("select").count() == page.locator("label select").count()
    for chart in page.locator(".chart").all():
        figure = chart.locator("xpath=ancestor::figure")
        text = figure.locator("figcaption").inner_text()
        assert len(text) > 30 and chart.get_attribute("aria-label") == text
        assert figure.locator("details table tbody tr").count() > 0
    assert page.locator("main table").count() == page.locator("main table:has(th[scope])").count()


def test_without_scripts(browser: object, page_file: Path) -> None:
    """Where they are forbidden the numbers are still there, and the page says why there are no charts."""
    context = browser.new_context(java_script_enabled=False)  # type: ignore[attr-defined]
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert page.locator("table").count() > 10 and "Without JavaScript" in page.locator("noscript").inner_text()
    context.close()
