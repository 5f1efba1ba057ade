"""The artefact: one folder that `AutoModelForCausalLM.from_pretrained` loads after `import lolcats`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lolcats.config import RunConfig, dump_config
from lolcats.files import atomic_folder

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
