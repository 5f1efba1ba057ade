"""The page: one HTML file that asks for nothing else, from sections and figures."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from lolcats.config import dump_config
from lolcats.report.charts.theme import VEGA_LITE
from lolcats.report.figure import SHOWN_ROWS, Lacking, Section, show_cell
from lolcats.report.generations import Comparison
from lolcats.report.pack import packed
from lolcats.report.subject import Subject
from lolcats.report.summary import Summary
from lolcats.version import __version__

PACKAGE = "lolcats.report"
PICTURE_COLORS = 128
"""Of a picture on the page; the one in the folder has all."""


@dataclass
class Content:
    """What is on the page."""

    summaries: list[Summary]
    """The first screen, one of each run or model."""
    sections: list[Section]
    lacking: list[Lacking]
    comparisons: list[Comparison]


def render(subjects: Sequence[Subject], content: Content, files: str) -> str:
    """The text of the page.

    Args:
        subjects: runs and models.
        content: what is shown of them.
        files: name of the folder beside the page with PNG and CSV.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"cell": show_cell, "picture": _data_url, "chart": _chart}
    script, library = _text("page.js"), bundle()
    return environment.from_string(_text("page.html.j2")).render(
        subjects=subjects,
        **vars(content),
        files=files,
        recipes=[dump_config(subject.config) for subject in subjects],
        style=_text("page.css"),
        script=script,
        library=library,
        policy=policy([library, script]),
        shown=SHOWN_ROWS,
        version=__version__,
    )


@cache
def bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script, of the versions that Altair writes for."""
    import vl_convert

    # A page must not end inside of it; no string of JavaScript is changed by the backslash.
    return (
        vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
        .replace("</script", "<\\/script")
        .replace("<!--", "<\\!--")
    )


def policy(scripts: Sequence[str]) -> str:
    """A content security policy under which these scripts run, and nothing is asked for."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _text(name: str) -> str:
    return (resources.files(PACKAGE) / "templates" / name).read_text(encoding="utf-8")


def _data_url(picture: bytes) -> str:
    """A picture in as many colours as maps and figures need, which takes a third of the room."""
    from PIL import Image

    small = io.BytesIO()
    with Image.open(io.BytesIO(picture)) as image:
        image.convert("RGB").quantize(PICTURE_COLORS, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"


def _chart(spec: dict[str, Any]) -> Any:
    """JSON that no text inside of it can end the script of."""
    import markupsafe

    text = json.dumps(packed(spec), allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return markupsafe.Markup(text)
