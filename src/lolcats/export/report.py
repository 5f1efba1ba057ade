"""The page that `lolcats report` made of a run, beside the model card."""

from __future__ import annotations

import html
import json
from pathlib import Path

from lolcats.config import RunConfig
from lolcats.errors import LolcatsError
from lolcats.export.contents import REPORT_FILE, check_link
from lolcats.export.source import Source, last_part


def read_report(source: Source) -> str | None:
    """The page in the folder of a run, or of a model that was exported before; None where there is none.

    Raises:
        LolcatsError: it cannot be read, or is a link out of its folder.
    """
    file = (source.model if source.run is None else source.run.path) / REPORT_FILE
    if not file.is_file():
        return None
    check_link(file, file.parent)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LolcatsError(f"cannot read {file}: {error}; delete it, and make it anew by lolcats report") from error


def without_places(page: str, source: Source, base: str) -> str:
    """A page with names instead of this machine's paths: of the run, the base model and the sources of text.

    Args:
        page: HTML, with data as JSON in it.
        source: as its run was made.
        base: what the base model is called.
    """
    names = {str(place): place.name for place in _folders(source)}
    names |= {name: last_part(name) for name in _sources(source.config)} | {source.config.model: base}
    for place in sorted(filter(_is_of_machine, names), key=len, reverse=True):  # a folder after what lies in it
        for form in dict.fromkeys((place, html.escape(place), json.dumps(place)[1:-1])):
            page = page.replace(form, names[place])
    return page


def _folders(source: Source) -> list[Path]:
    """Of the model, its run, and where its runs lie, as they are named and as they are."""
    folders = [source.model] if source.run is None else [source.model, source.run.path, source.run.path.parent]
    return [form for folder in folders for form in (folder, folder.resolve())]


def _sources(config: RunConfig) -> list[str]:
    """Of text, copies of them among these."""
    given = [*config.data.sources, *config.evaluation.sources, *config.data.local.values()]
    return [source if isinstance(source, str) else source.name for source in given]


def _is_of_machine(name: str) -> bool:
    """Whether a name is a path that only this machine has, and long enough to be nothing else in a page."""
    path = Path(name)
    return (path.is_absolute() or name.startswith("~")) and len(path.parts) > 2
