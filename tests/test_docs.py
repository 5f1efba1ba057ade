"""The documentation: its links lead somewhere, and its commands have the options that they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import pytest
import typer

from lolcats.cli.app import app
from lolcats.config import RunConfig
from lolcats.config.load import dotted
from lolcats.config.mixers import MIXERS
from lolcats.sweep.measure import MeasureConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED = re.compile(r"\b(?:docs|configs|benchmarks|tests|src)/[\w./-]*\w\.(?:md|py|yaml|json)\b")
"""Files of the repository as texts and comments name them."""


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """What `#...` may name on a page: its headings as GitHub makes them."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower().strip()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        count = found.get(name, 0)
        found[name] = count + 1
        names.add(f"{name}-{count}" if count else name)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("folder", ["docs", "configs", "src", "tests", "benchmarks", "."])
def test_files_that_are_named_exist(folder: str) -> None:
    """In prose, comments and docstrings too, where there is no link to check."""
    files = (ROOT / folder).glob("*.md") if folder == "." else (ROOT / folder).rglob("*")
    texts = [path for path in files if path.suffix in (".md", ".py", ".yaml") and path != Path(__file__)]
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in texts
        for name in NAMED.findall(path.read_text(encoding="utf-8"))
        if not (ROOT / name).exists() and not name.endswith("NAME.py")
    }
    assert not missing


def test_pages_are_linked() -> None:
    """Every page can be reached from the README."""
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        links = [link.partition("#")[0] for link in LINK.findall(prose(page))]
        todo += [(page.parent / link).resolve() for link in links if link.endswith(".md") and ":" not in link]
    assert {str(page.relative_to(ROOT)) for page in PAGES} <= {str(page.relative_to(ROOT)) for page in reached}


OPTION = re.compile(r"(?<=\s)--[a-z][a-z-]*")
KEY = re.compile(r"(?<=[\s'\"])([a-z][a-z_]*(?:\.[A-Za-z_/-]+)*)=")


def commands() -> list[tuple[str, str, str]]:
    """(page, verb, the rest of the line) of each command of ours that the documentation shows."""
    found = []
    for page in [*PAGES, *(ROOT / "configs").rglob("*.yaml")]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = "\n".join(re.findall(r"^ *```sh.*?\n(.*?)^ *```$", text, flags=re.M | re.S))
        lines = re.findall(r"^ *lolcats [^\n]*", blocks, flags=re.M)
        lines += re.findall(r"^(?: {4}|#  +)lolcats [^\n]*", text, flags=re.M)
        lines += re.findall(r"`lolcats [^`]*`", prose(page))
        for line in lines if page.name != "CHANGELOG.md" else []:
            verb, _, rest = " ".join(line.strip("`# ").split()).removeprefix("lolcats ").partition(" ")
            found.append((str(page.relative_to(ROOT)), verb, f" {rest.partition(' #')[0]}"))
    return found


def test_commands_have_the_options_that_they_are_shown_with() -> None:
    verbs = cast(Any, typer.main.get_command(app)).commands
    found = commands()
    assert len(found) > 60
    for page, verb, rest in found:
        if not verb.islower():
            continue  # `lolcats VERB --help`
        assert verb in verbs, (page, verb)
        if verbs[verb].context_settings.get("ignore_unknown_options"):
            continue  # they are another program's
        known = {option for parameter in verbs[verb].params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert set(OPTION.findall(rest)) <= known | {"--help"}, (page, verb, rest)


def test_settings_that_commands_are_shown_with_exist() -> None:
    layers = [RunConfig.model_validate({"linearization": {"mixer": name}}).model_dump() for name in MIXERS]
    valid = {key for run in layers for key in dotted(run)}
    valid |= {*(f"measure.{key}" for key in MeasureConfig.model_fields), "measure"}
    for page, verb, rest in commands():
        if verb not in ("linearize", "sweep", "plan", "plan-memory"):
            continue
        for key in KEY.findall(rest):
            assert key in valid or key.startswith("data.local."), (page, verb, key)
