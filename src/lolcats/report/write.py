"""`write_report`: the page, and beside it a folder with a picture and the numbers of every figure."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lolcats.errors import LolcatsError
from lolcats.files import atomic_folder, write_text
from lolcats.report.figure import Figure
from lolcats.report.subject import Subject

NEEDED = ("altair", "jinja2", "matplotlib", "vl_convert")
SUFFIXES = (".html", ".htm")
OWN = (".png", ".csv")
"""What the folder beside the page holds."""
WIDTH = 720
"""Pixels of a chart in the folder; on the page it is as wide as there is room."""


def check_report(output: Path) -> None:
    """Raise LolcatsError where no report could be written; meant for before an analysis.

    Raises:
        LolcatsError: a package is missing, the name is no .html file, or its folder of figures holds other things.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise LolcatsError(f'reports need {", ".join(missing)}: pip install "lolcats[report]"')
    if output.suffix.lower() not in SUFFIXES:
        raise LolcatsError(f"a report is an HTML file; give a name that ends in .html instead of {output.name}")
    folder = files_folder(output)
    foreign = [file for file in folder.rglob("*") if file.suffix not in OWN] if folder.is_dir() else []
    if foreign or (folder.exists() and not folder.is_dir()):
        what = foreign[0] if foreign else folder
        raise LolcatsError(f"{what} is in the way: {folder.name} is where the figures go; choose another name")


def files_folder(output: Path) -> Path:
    """Where the pictures and numbers of a page go."""
    return output.with_name(f"{output.stem}_files")


def write_report(
    subjects: Sequence[Subject],
    output: Path,
    *,
    first_head: int | None = None,
    progress: Callable[[str, int, int | None], None] = lambda name, done, count: None,
) -> list[Path]:
    """Write the page of some runs and models and the folder of its figures; both are replaced if they are there.

    Args:
        subjects: see `gather`.
        output: a .html file.
        first_head: the head that maps of attention show at first; None is the lowest.
        progress: called with what is done, and how many of how many are.

    Returns:
        The page and the folder.

    Raises:
        LolcatsError: see `check_report`; or the place cannot be written.
    """
    check_report(output)
    from lolcats.report.generations import comparisons
    from lolcats.report.maps import text_maps
    from lolcats.report.page import Content, render
    from lolcats.report.sections import make_sections
    from lolcats.report.summary import summary

    progress("reading", 0, None)
    sections, lacking = make_sections(subjects, list(text_maps(subjects)), first_head)
    folder, figures = files_folder(output), [figure for section in sections for figure in section.figures]
    with atomic_folder(folder) as temporary:
        for number, figure in enumerate(figures):
            progress(figure.title, number, len(figures))
            write_figure(figure, temporary)
    progress("writing the page", len(figures), len(figures))
    content = Content([summary(s) for s in subjects], sections, lacking, list(comparisons(subjects)))
    page = render(subjects, content, folder.name)
    write_text(output, page)
    return [output, folder]


def write_figure(figure: Figure, folder: Path) -> None:
    """The numbers of a figure as CSV, and its picture as PNG where it has one."""
    (folder / f"{figure.key}.csv").write_text(figure.table.to_csv(), encoding="utf-8")
    if figure.spec is not None:
        (folder / f"{figure.key}.png").write_bytes(picture(figure.spec, figure.title))
    elif figure.picture is not None:
        (folder / f"{figure.key}.png").write_bytes(figure.picture)


def picture(spec: dict[str, Any], title: str) -> bytes:
    """A chart as PNG, as it is at first; what is chosen stands under its title."""
    import vl_convert

    from lolcats.report.charts.theme import VEGA_LITE

    still = copy.copy(spec)
    if still.get("width") == "container":
        still["width"] = WIDTH
    chosen = [f"{one['bind']['name'].strip()}: {one['value']}" for one in spec.get("params", []) if "bind" in one]
    still["title"] = {"text": title, "subtitle": ", ".join(chosen)}
    still["config"] = spec["config"] | {"background": "white"}
    return vl_convert.vegalite_to_png(still, vl_version=VEGA_LITE, scale=1.5)
