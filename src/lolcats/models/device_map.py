"""`device_map`: which part of a model lies where, for models that do not fit on one device."""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.files import read_json_object
from lolcats.models.config import read_model_config
from lolcats.models.device import choose_device
from lolcats.models.empty import empty_model

NAMED = ("auto", "balanced")
DeviceMap = str | dict[str, str]
"""A name of `NAMED`, or part of the model -> "cpu", "disk" or "cuda:N"."""


def read_device_map(text: str) -> DeviceMap:
    """What an option says: auto, balanced, or a file of JSON.

    Raises:
        LolcatsError: it is none of these, or names a place that this machine does not have.
    """
    if text in NAMED:
        return text
    if not text.endswith(".json"):
        raise LolcatsError(f"unknown device map {text!r}; expected {', '.join(NAMED)} or FILE.json")
    if not Path(text).is_file():
        raise LolcatsError(f"no file {text}; expected {', '.join(NAMED)} or FILE.json with {{PART: PLACE, ...}}")
    content = read_json_object(Path(text), "expected {PART: PLACE, ...}")
    for part, place in content.items():
        if not re.fullmatch(r"cpu|disk|cuda:[0-9]+", str(place)):
            raise LolcatsError(f"{text}: {part}: {place!r:.40} is no place; expected cpu, disk or cuda:N")
        if place != "disk":
            choose_device(place)
    if not content:
        raise LolcatsError(f"{text} places no part of a model; expected {{PART: PLACE, ...}}, such as "
                           '{"model.embed_tokens": "cuda:0", "model.layers.0": "cpu", ...}')  # fmt: skip
    return content


def first_device(device_map: DeviceMap) -> torch.device:
    """Where a model computes: on the first GPU that it may use, else on the CPU."""
    if isinstance(device_map, str):
        return choose_device("auto")
    return torch.device(next((place for place in device_map.values() if place not in ("cpu", "disk")), "cpu"))


def check_parts(device_map: DeviceMap, source: str) -> None:
    """See that a map is one of a model: its parts are there, and none of the weights is left out.

    Raises:
        LolcatsError: the message names what is wrong.
    """
    if isinstance(device_map, str):
        return
    model = empty_model(read_model_config(source))
    weights = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    known = {name for name, _ in model.named_modules()} | {*weights}
    if strange := [part for part in device_map if part not in known]:
        raise LolcatsError(f"the device map places {strange[0]!r}, which {source} does not have; it has parts such as "
                           f"{', '.join(n for n in sorted(known, key=len) if n)[:120]}")  # fmt: skip
    for name in weights:
        if not any(part == "" or name == part or name.startswith(f"{part}.") for part in device_map):
            raise LolcatsError(f"the device map leaves out {name} of {source}; place it, or a part that it is in")


def load_options(device_map: DeviceMap) -> dict[str, Any]:
    """What `from_pretrained` needs; `offload_folder` is there until `forget_with` says otherwise."""
    return {"device_map": device_map, "offload_folder": tempfile.mkdtemp(prefix="lolcats-offload-")}


def forget_with(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Delete the folder of `load_options` when the model is gone."""
    weakref.finalize(model, shutil.rmtree, options["offload_folder"], ignore_errors=True)
