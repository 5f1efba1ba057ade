"""`export_model`: one finished model, written in one of three formats."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, cast

import torch

from lolcats.config import dump_config
from lolcats.errors import LolcatsError
from lolcats.export.adapter import write_adapter
from lolcats.export.card import Format, model_card
from lolcats.export.contents import REPORT_FILE, copy_files, model_files
from lolcats.export.folder import check_place, new_folder
from lolcats.export.remote_code import write_code
from lolcats.export.report import read_report, without_places
from lolcats.export.source import Source, is_local, last_part, open_source, without_paths
from lolcats.export.weights import check_loads, check_model, write_weights
from lolcats.models.shards import INDEX, SHARD_BYTES, weight_files
from lolcats.runs.artefact import RECIPE_FILE, RESULTS_FILE
from lolcats.runs.trained import assemble_run

FORMATS: tuple[Format, ...] = ("merged", "adapter", "remote-code")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Exported(NamedTuple):
    """What was written."""

    folder: Path
    size: int
    """Bytes of all files."""
    model_size: int
    """Bytes of the whole model's weights, to compare an adapter with."""
    left_out: list[str]
    """Names of what lies in the model's folder and is no part of a model."""
    report: bool = False
    """Whether the page of the run is among the files."""


def export_model(
    source: str | Path,
    out: str | Path,
    format: str = "merged",
    *,
    base: str | None = None,
    overwrite: bool = False,
    name: str | None = None,
    hide_paths: bool = False,
    dtype: str | None = None,
    shard_bytes: int | None = None,
) -> Exported:
    """Write a linearized model so that others can load it. Weights are read and written a few rows at a time.

    Args:
        source: the folder of a finished run, or of the model in it; or of a run that has trained both stages and could
            not save its model, which is put together from its teacher's files then.
        out: the folder to write; it appears only when it is complete.
        format: "merged" (the whole model), "adapter" (LoRA and what the linearization added, a peft adapter) or
            "remote-code" (the whole model, and the code to load it without this package).
        base: what the base model is called where the readers are; None is the recipe's `model`.
        overwrite: replace an earlier export at `out`.
        name: what the model card calls the exported model; None is the folder's name.
        hide_paths: write file names instead of this machine's paths into the recipe; always so if `base` is given.
        dtype: "float32", "bfloat16" or "float16" for the weights of a whole model; what the linearization added stays
            float32. None keeps the model's.
        shard_bytes: bytes of one file of weights; None keeps the model's files, or is 5 GB where they change.

    Raises:
        LolcatsError: no such format, model or run, a place that cannot be written, a run without an adapter, or
            weights that are not whole; nothing is written then.
    """
    how = _checked(format, dtype, shard_bytes)
    opened, out = open_source(Path(source)), Path(out)
    report = read_report(opened)
    if base is not None or hide_paths:
        base = base or last_part(opened.config.model)
        report = None if report is None else without_places(report, opened, base)
        opened.config = without_paths(opened.config, base)
        opened.results.model = opened.config.model
    keep = [opened.model] if opened.run is None else [opened.model, opened.run.path]
    check_place(out, overwrite, keep)
    files, left_out, weights = [], [], 0
    if opened.has_model:
        files, left_out = model_files(opened.model)
        check_model(opened.model)
        weights = sum(file.stat().st_size for file in weight_files(opened.model))
    with new_folder(out, overwrite=overwrite, keep=keep) as folder:
        write_format(opened, files, folder, format, how)
        write_texts(opened, folder, cast(Format, format), name or out.resolve().name, report)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return Exported(out, size, weights or size, left_out, report is not None)


class Writing(NamedTuple):
    """How the weights of a whole model are written."""

    dtype: torch.dtype | None
    shard_bytes: int | None


def _checked(format: str, dtype: str | None, shard_bytes: int | None) -> Writing:
    if format not in FORMATS:
        raise LolcatsError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise LolcatsError(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if format == "adapter" and (dtype or shard_bytes):
        raise LolcatsError("dtype and the size of files are of a whole model's weights; an adapter keeps its own")
    if shard_bytes is not None and shard_bytes < 1:
        raise LolcatsError(f"expected files of 1 byte or more, got {shard_bytes}")
    return Writing(None if dtype is None else DTYPES[dtype], shard_bytes)


def write_format(source: Source, files: list[Path], folder: Path, format: str, how: Writing) -> None:
    """Weights and what is needed to load them."""
    if format == "adapter":
        write_adapter(source, folder)
        return
    if not source.has_model:
        assert source.run is not None
        assemble_run(source.run, folder, how.shard_bytes or SHARD_BYTES, how.dtype)
        check_loads(folder)
    elif how == Writing(None, None):
        copy_files(files, source.model, folder)
    else:
        rest = [file for file in files if file.name != INDEX and file not in weight_files(source.model)]
        copy_files(rest, source.model, folder, how.dtype)
        write_weights(source.model, folder, how.dtype, how.shard_bytes or SHARD_BYTES)
    if format == "remote-code":
        write_code(folder)


def write_texts(source: Source, folder: Path, format: Format, name: str, report: str | None) -> None:
    """Recipe, results, the page of the run where it has one, and the model card."""
    (folder / RECIPE_FILE).write_text(dump_config(source.config))
    (folder / RESULTS_FILE).write_text(source.results.text())
    if report is not None:
        (folder / REPORT_FILE).write_text(report, encoding="utf-8")
    card = model_card(source.config, source.results, format, name=name, report=report is not None)
    (folder / "README.md").write_text(card, encoding="utf-8")


def check_shareable(source: str | Path, base: str | None) -> None:
    """Raise LolcatsError if the base model has no name that readers elsewhere could know."""
    model = base or open_source(Path(source)).config.model
    if is_local(model) or Path(model).exists():
        raise LolcatsError(f"the base model {model} is a path of this machine; say what it is called", hint="base")
