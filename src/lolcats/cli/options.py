"""Options that several verbs share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lolcats.errors import LolcatsError
from lolcats.models.folder import expand


def _accepted(fits: Callable[[Any], object], problem: str) -> Callable[[Any], Any]:
    """A callback that refuses the values of an option that do not fit."""

    def check(value: Any) -> Any:
        if not fits(value):
            raise typer.BadParameter(problem.format(value))
        return value

    return check


def expand_path(path: Path | None) -> Path | None:
    """A path option with `~` written out."""
    return None if path is None else expand(path)


_device = _accepted(
    re.compile(r"auto|cpu|mps|cuda(:[0-9]+)?").fullmatch, "unknown device {!r}; expected auto, cpu, mps, cuda or cuda:N"
)
_dtype = _accepted(
    ("auto", "float32", "bfloat16").__contains__, "unknown format {!r}; expected auto, float32 or bfloat16"
)
_engine = _accepted(("transformers", "vllm").__contains__, "unknown engine {!r}; expected transformers or vllm")
_temperature = _accepted(lambda value: value == 0 or 0.01 <= value <= 100, "expected 0 or 0.01 to 100, got {}")
_top_p = _accepted(lambda value: 0 < value <= 1, "expected above 0 and up to 1, got {}")
MAX_SEED = 2**32 - 1
"""What numpy takes."""
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help='A linearized model or its run folder; or a hub name, folder, .gguf file or "demo".'
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", callback=_device, help="auto, cpu, mps, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(metavar="NAME", callback=_dtype, help="auto, float32 or bfloat16.")]
DeviceMapName = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        metavar="MAP",
        help="Spread a model over devices: auto, balanced, or FILE.json of {part: cpu, disk or cuda:N}.",
    ),
]
Engine = Annotated[
    str, typer.Option(metavar="NAME", callback=_engine, help="transformers, or vllm where it is installed.")
]
NewTokens = Annotated[int, typer.Option(min=1, max=10**7, help="Most tokens to write.")]
Temperature = Annotated[
    float, typer.Option(callback=_temperature, help="0 always takes the likeliest token; else 0.01 to 100.")
]
TopP = Annotated[float, typer.Option(callback=_top_p, help="Sample from the likeliest tokens of this total share.")]
Graphs = Annotated[bool, typer.Option(help="On a GPU, replay recorded steps, which is faster.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sampling.")]


def split_words(texts: list[str]) -> list[str]:
    """What commas or spaces between arguments part; empty words are left out."""
    return [word.strip() for text in texts for word in text.split(",") if word.strip()]


def check_target(file: Path | None) -> Path | None:
    """The option of a file that is written at the end, with ~ expanded; refused before the work begins.

    Raises:
        LolcatsError: a folder, or in one that is missing or may not be written.
    """
    if file is None:
        return None
    file = expand(file)
    if file.is_dir():
        raise LolcatsError(f"{file} is a folder; name a file to write")
    if not file.resolve().parent.is_dir():
        raise LolcatsError(f"no folder {file.parent} to write {file.name} into")
    if not os.access(file.resolve().parent, os.W_OK):
        raise LolcatsError(f"cannot write into the folder {file.parent}; name a file elsewhere")
    return file


def device_map_of(name: str | None, device: str) -> Any:
    """What `--device-map` says, None where it is not given.

    Raises:
        LolcatsError: see `read_device_map`; or `--device` is given too.
    """
    if name is None:
        return None
    if device != "auto":
        raise LolcatsError(f"--device {device} is one place and --device-map {name} several; give one of them")
    from lolcats.models.device_map import read_device_map

    return read_device_map(name)


def sampling(temperature: float, top_p: float) -> dict[str, object]:
    """The options of `generate` for a temperature and a top-p."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p}
