"""The artefact: one folder that `AutoModelForCausalLM.from_pretrained` loads after `import lolcats`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.config import RunConfig, dump_config
from lolcats.errors import LolcatsError

RECIPE_FILE = "lolcats_recipe.yaml"
RESULTS_FILE = "lolcats_results.json"


def save_artefact(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    results: dict[str, Any],
) -> None:
    """Write model, tokenizer, recipe and measured results; the folder appears only when it is complete.

    Raises:
        LolcatsError: the disk is full or the place cannot be written; nothing is left behind then.
    """
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / RECIPE_FILE).write_text(dump_config(config))
        (temporary / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place at the end; what was there before is deleted only then.

    Raises:
        LolcatsError: the disk is full or the place cannot be written; everything is as before then.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        reason = getattr(error, "strerror", None) or str(error)
        raise LolcatsError(f"cannot write {folder}: {reason}; what was there before is untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
