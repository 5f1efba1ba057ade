"""`export_model`: one finished model, written in one of three formats."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, cast

from lolcats.config import dump_config
from lolcats.errors import LolcatsError
from lolcats.export.adapter import write_adapter
from lolcats.export.card import Format, model_card
from lolcats.export.contents import copy_files, model_files, weight_files
from lolcats.export.folder import check_place, new_folder
from lolcats.export.remote_code import write_code
from lolcats.export.source import Source, is_local, last_part, open_source, without_paths
from lolcats.export.weights import check_model
from lolcats.runs.artefact import RECIPE_FILE, RESULTS_FILE

FORMATS: tuple[Format, ...] = ("merged", "adapter", "remote-code")


class Exported(NamedTuple):
    """What was written."""

    folder: Path
    size: int
    """Bytes of all files."""
    model_size: int
    """Bytes of the whole model's weights, to compare an adapter with."""
    left_out: list[str]
    """Names of what lies in the model's folder and is no part of a model."""


def export_model(
    source: str | Path,
    out: str | Path,
    format: str = "merged",
    *,
    base: str | None = None,
    overwrite: bool = False,
    name: str | None = None,
    hide_paths: bool = False,
) -> Exported:
    """Write a linearized model so that others can load it.

    Args:
        source: the folder of a finished run, or of the model in it.
        out: the folder to write; it appears only when it is complete.
        format: "merged" (the whole model), "adapter" (LoRA and what the linearization added, a peft adapter) or
            "remote-code" (the whole model, and the code to load it without this package).
        base: what the base model is called where the readers are; None is the recipe's `model`.
        overwrite: replace an earlier export at `out`.
        name: what the model card calls the exported model; None is the folder's name.
        hide_paths: write file names instead of this machine's paths into the recipe; always so if `base` is given.

    Raises:
        LolcatsError: no such format, model or run, a place that cannot be written, a run without an adapter, or
            weights that are not whole; nothing is written then.
    """
    if format not in FORMATS:
        raise LolcatsError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}")
    opened, out = open_source(Path(source)), Path(out)
    if base is not None or hide_paths:
        opened.config = without_paths(opened.config, base or last_part(opened.config.model))
        opened.results.model = opened.config.model
    keep = [opened.model] if opened.run is None else [opened.model, opened.run.path]
    check_place(out, overwrite, keep)
    files, left_out = model_files(opened.model)
    check_model(opened.model)
    with new_folder(out, overwrite=overwrite, keep=keep) as folder:
        write_format(opened, files, folder, format)
        write_texts(opened, folder, cast(Format, format), name or out.resolve().name)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return Exported(out, size, sum(file.stat().st_size for file in weight_files(opened.model)), left_out)


def write_format(source: Source, files: list[Path], folder: Path, format: str) -> None:
    """Weights and what is needed to load them."""
    if format == "adapter":
        write_adapter(source, folder)
        return
    copy_files(files, source.model, folder)
    if format == "remote-code":
        write_code(folder)


def write_texts(source: Source, folder: Path, format: Format, name: str) -> None:
    """Recipe, results and model card."""
    (folder / RECIPE_FILE).write_text(dump_config(source.config))
    (folder / RESULTS_FILE).write_text(source.results.text())
    card = model_card(source.config, source.results, format, name=name)
    (folder / "README.md").write_text(card, encoding="utf-8")


def check_shareable(source: str | Path, base: str | None) -> None:
    """Raise LolcatsError if the base model has no name that readers elsewhere could know."""
    model = base or open_source(Path(source)).config.model
    if is_local(model) or Path(model).exists():
        raise LolcatsError(f"the base model {model} is a path of this machine; say what it is called", hint="base")
