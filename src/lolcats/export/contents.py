"""What of a model's folder is exported: the files that a model is made of, and nothing that merely lies beside them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch

from lolcats.errors import LolcatsError
from lolcats.models.shards import INDEX, WEIGHTS, weight_files
from lolcats.runs.artefact import RECIPE_FILE, RESULTS_FILE

TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates of a tokenizer that has several."""
REPORT_FILE = "report.html"
"""The page of a run, in its folder or beside an exported model."""
KNOWN = re.compile(
    r"config\.json|generation_config\.json|model\.safetensors\.index\.json"
    r"|tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|vocab[\w.-]*\.(json|txt)|merges[\w.-]*\.txt"
    r"|(tokenizer|spiece|sentencepiece[\w.-]*)\.model|[\w.-]+\.tiktoken|chat_template\.(jinja|json)"
    r"|(LICENSE|LICENCE|NOTICE)(\.txt|\.md)?",
    re.IGNORECASE,
)
"""Names of the files beside weights, recipe and results."""


def model_files(model: Path) -> tuple[list[Path], list[str]]:
    """The files of a model that are exported, and the names of what is left out.

    Weights may be links to wherever there is room. Any other file may be one within the folder, or into the hub's
    cache, of whose folders all files are links: a link that leads elsewhere could publish what nobody meant to.

    Raises:
        LolcatsError: as for `weight_files`, or a known file is a link out of the folder.
    """
    weights = weight_files(model)
    found, left_out = list(weights), []
    for file in sorted([*model.iterdir(), *(model / TEMPLATES).glob("*.jinja")]):
        known = KNOWN.fullmatch(file.name) or file.name in (RECIPE_FILE, RESULTS_FILE) or file.parent.name == TEMPLATES
        if file in weights or file.name == TEMPLATES or (file.name == INDEX and weights[0].name == WEIGHTS):
            continue
        if known and file.is_file():
            check_link(file, model)
            found.append(file)
        elif file.suffix not in (".py", ".md") and file.name != REPORT_FILE:  # of an earlier export, written anew
            left_out.append(file.name)
    return found, left_out


def check_link(file: Path, model: Path) -> None:
    """Raise LolcatsError if a file of a model's folder is a link that leads elsewhere."""
    folder, target = model.resolve(), file.resolve()
    blobs = folder.parent.parent / "blobs"
    in_cache = folder.parent.name == "snapshots" and target.parent == blobs
    if target.parent not in (folder, folder / TEMPLATES) and not in_cache:
        raise LolcatsError(f"{file} is a link to {target}, outside the folder; put a copy of the file in its place")


def copy_files(files: list[Path], model: Path, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Copy the files of a model; config.json loses what is true of another folder only, and names `dtype` if given."""
    for file in files:
        target = folder / file.relative_to(model)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for entry in ("auto_map", "_name_or_path"):
        config.pop(entry, None)
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
