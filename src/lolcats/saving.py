"""The artefact: one folder that `AutoModelForCausalLM.from_pretrained` loads after `import lolcats`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

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
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / RECIPE_FILE).write_text(dump_config(config))
        (temporary / RESULTS_FILE).write_text(json.dumps(results, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except OSError as error:
        raise LolcatsError(f"cannot write the model to {folder}: {error}; the checkpoints are untouched") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
