"""A folder that appears complete or not at all, and replaces another only when asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lolcats.errors import LolcatsError
from lolcats.files import atomic_folder
from lolcats.runs.artefact import RECIPE_FILE


@contextmanager
def new_folder(out: Path, *, overwrite: bool, keep: list[Path]) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end.

    Args:
        out: the folder that is wanted; its parents are made.
        overwrite: replace `out` if it is an earlier export.
        keep: folders that must stay, with all that is in them.

    Raises:
        LolcatsError: `out` is there and may not be replaced, or the disk is full; nothing is left behind then.
    """
    check_place(out, overwrite, keep)
    with atomic_folder(out.resolve()) as temporary:  # behind a link, which stays one
        yield temporary


def check_place(out: Path, overwrite: bool, keep: list[Path]) -> None:
    """Raise LolcatsError unless `out` may be written: it is neither taken nor inside of what is exported."""
    place = out.resolve()
    for folder in (item.resolve() for item in keep):
        if place == folder or place in folder.parents:
            raise LolcatsError(f"{out} holds the model that is exported; choose another folder")
        if folder in place.parents:
            raise LolcatsError(f"{out} lies inside {folder}, which is exported; choose a folder outside it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not (out / RECIPE_FILE).is_file():
        raise LolcatsError(f"{out} exists and is no export of lolcats; choose another folder")
    if not overwrite:
        raise LolcatsError(f"{out} already holds an export; overwrite it, or choose another folder", hint="overwrite")
