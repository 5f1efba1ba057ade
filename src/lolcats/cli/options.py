"""Options that several verbs share."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from lolcats.errors import LolcatsError
from lolcats.models.folder import expand


def _check_device(name: str) -> str:
    if re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", name) is None:
        raise typer.BadParameter(f"unknown device {name!r}; expected auto, cpu, mps, cuda or cuda:N")
    return name


def _check_dtype(name: str) -> str:
    if name not in ("auto", "float32", "bfloat16"):
        raise typer.BadParameter(f"unknown format {name!r}; expected auto, float32 or bfloat16")
    return name


def _check_temperature(value: float) -> float:
    if value != 0 and not MIN_TEMPERATURE <= value <= MAX_TEMPERATURE:  # NaN is neither
        raise typer.BadParameter(f"expected 0 or {MIN_TEMPERATURE} to {MAX_TEMPERATURE:g}, got {value}")
    return value


def _check_top_p(value: float) -> float:
    if not 0 < value <= 1:
        raise typer.BadParameter(f"expected above 0 and up to 1, got {value}")
    return value


def expand_path(path: Path | None) -> Path | None:
    """A path option with `~` written out."""
    return None if path is None else expand(path)


MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
MAX_SEED = 2**32 - 1
"""What numpy takes."""
MAX_COUNT = 10**9
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help='A linearized model or its run folder; or a hub name, folder, .gguf file or "demo".'
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", callback=_check_device, help="auto, cpu, mps, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(metavar="NAME", callback=_check_dtype, help="auto, float32 or bfloat16.")]
NewTokens = Annotated[int, typer.Option(min=1, max=10**7, help="Most tokens to write.")]
Temperature = Annotated[
    float, typer.Option(callback=_check_temperature, help="0 always takes the likeliest token; else 0.01 to 100.")
]
TopP = Annotated[
    float, typer.Option(callback=_check_top_p, help="Sample from the likeliest tokens of this total share.")
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sampling.")]


def check_target(file: Path | None) -> Path | None:
    """A file that is written at the end, with ~ expanded; refused before the work begins if it cannot be.

    Raises:
        LolcatsError: a folder, or in one that is missing or may not be written.
    """
    if file is None:
        return None
    file = file.expanduser()
    if file.is_dir():
        raise LolcatsError(f"{file} is a folder; name a file to write")
    if not file.resolve().parent.is_dir():
        raise LolcatsError(f"no folder {file.parent} to write {file.name} into")
    if not os.access(file.resolve().parent, os.W_OK):
        raise LolcatsError(f"cannot write into the folder {file.parent}; name a file elsewhere")
    return file


def sampling(temperature: float, top_p: float) -> dict[str, object]:
    """The options of `generate` for a temperature and a top-p."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p}
